"""A swarm of real nodes: a trunk, and hosts of its experts, each with two hosts. The answer is the whole model's, also
when a host dies; and when an expert is left to nobody, the trunk says which."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from p2pmodel import starter
from p2pmodel.cli.localswarm import LocalSwarm, NodeProcess
from p2pmodel.domain.errors import P2PModelError, Unreachable
from p2pmodel.engine.checkpoint import load_whole
from p2pmodel.node.asking.client import Answer, Sampling, SwarmClient
from tests.support.experts import save_experts
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(400)
TOKENS = 16
PROMPT = "the cat sat"
PATIENCE = 120.0
HOSTS = {"low": "0-4", "high": "3-7", "ends": "0-2,5-7"}
"""Every expert has two of them."""


@dataclass
class Nodes:
    swarm: LocalSwarm
    model: Path
    first: NodeProcess
    client: SwarmClient
    expected: list[int]

    def start(self, name: str, *arguments: str) -> NodeProcess:
        return self.swarm.start(name, "--threads", "1", "--peers", self.first.address, *arguments)

    def host(self, name: str, experts: str, *arguments: str) -> NodeProcess:
        return self.start(name, "--model", str(self.model), "--base", str(self.model), "--experts", experts, *arguments)

    def trunk(self, name: str, *arguments: str) -> NodeProcess:
        return self.start(name, "--model", str(self.model), "--base", str(self.model), "--experts", "none", *arguments)

    def answer(self) -> Answer:
        return self.client.generate(PROMPT, Sampling(TOKENS), "head", "fp32", lambda _: None)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("experts")
    model = folder / "model"
    model.mkdir()
    tokens = len(starter_tokenizer(model))
    save_experts("qwen3_moe", model, vocab_size=tokens, max_position_embeddings=128, eos_token_id=None)
    with LocalSwarm(folder) as swarm:
        first = swarm.start("first", "--model", str(model), "--layers", "none")
        first.wait_until_serving(time.monotonic() + PATIENCE)
        client = SwarmClient.connect(folder / "client", (first.address,), str(model), model)
        whole = load_whole(model)
        ids = client.encode(PROMPT)
        with torch.inference_mode():
            out = whole.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                do_sample=False,
                pad_token_id=client.tokenizer.pad_token_id or client.tokenizer.eos_token_id,
            )
        found = Nodes(swarm, model, first, client, out[0, ids.shape[1] :].tolist())
        for name, experts in HOSTS.items():
            found.host(name, experts)
        found.trunk("trunk")
        swarm.wait_until_serving(PATIENCE)
        yield found
        client.close()


def starter_tokenizer(folder: Path) -> list[str]:
    """Copies it; returns its tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(starter.MODEL)
    tokenizer.save_pretrained(folder)
    return list(tokenizer.get_vocab())


def text_of(nodes: Nodes) -> str:
    return str(nodes.client.tokenizer.decode(nodes.expected, skip_special_tokens=True))


def test_the_answer_is_the_whole_models(nodes: Nodes) -> None:
    until(lambda: "all experts are served" in nodes.swarm.nodes["trunk"].lines)
    answer = nodes.answer()
    assert answer.text == text_of(nodes)
    assert answer.failovers == answer.spread_gates == 0


def test_a_host_that_is_killed_costs_a_retry_not_the_answer(nodes: Nodes) -> None:
    pieces: list[str] = []

    def show(piece: str) -> None:
        if not pieces:
            nodes.swarm.nodes["high"].kill()
        pieces.append(piece)

    answer = nodes.client.generate(PROMPT, Sampling(TOKENS), "head", "fp32", show)
    assert answer.text == text_of(nodes)
    assert answer.failovers == 0
    assert nodes.answer().text == text_of(nodes)


def test_an_expert_that_is_left_to_nobody(nodes: Nodes) -> None:
    trunk = nodes.swarm.nodes["trunk"]
    nodes.swarm.nodes["ends"].kill()
    until(lambda: any("nobody serves expert 5 of layer 0" in line for line in trunk.lines))
    with contextlib.suppress(P2PModelError):
        nodes.client.look()
    with pytest.raises(Unreachable):
        nodes.answer()
    lenient = nodes.trunk("lenient", "--missing-experts", "spread")
    lenient.wait_until_serving(time.monotonic() + PATIENCE)

    def answers() -> bool:
        try:
            return nodes.answer().spread_gates > 0
        except Unreachable:
            return False

    until(answers)
    until(lambda: all(5 not in experts for experts in leased(lenient)))  # the dead host's lease is over
    again = nodes.host("again", "auto", "--capacity", "3")
    again.wait_until_serving(time.monotonic() + PATIENCE)
    assert "experts 5-7 of layers 0:4: experts 5-7 are served by nobody" in again.lines
    until(lambda: trunk.lines[-1] == "all experts are served")
    until(lambda: is_right(nodes))


def test_who_chose_experts_by_itself_takes_those_that_another_leaves(nodes: Nodes) -> None:
    """Peer `low` has 0 to 4, and was told to."""
    spare = nodes.host("spare", "auto", "--capacity", "3")
    spare.wait_until_serving(time.monotonic() + PATIENCE)
    assert any("is asked most for its 1 host" in line for line in spare.lines)
    nodes.swarm.nodes["again"].stop()
    until(lambda: len(leased(spare)) == 2 and (5, 6, 7) in leased(spare))
    until(lambda: is_right(nodes))


def leased(node: NodeProcess) -> list[tuple[int, ...]]:
    """The experts of each host, as the node sees them."""
    with node.control() as client:
        return [tuple(lease.experts) for lease in client.status().models[0].expert_leases]


def is_right(nodes: Nodes) -> bool:
    try:
        answer = nodes.answer()
    except Unreachable:
        return False
    return answer.spread_gates == 0 and answer.text == text_of(nodes)
