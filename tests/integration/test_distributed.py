"""The Python API over real nodes: the family's own CausalLM, against the same model in this process."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, TextStreamer

from p2pmodel import DistributedModelForCausalLM, starter
from p2pmodel.cli.localswarm import LocalSwarm
from p2pmodel.domain.errors import NotRunning
from p2pmodel.engine.checkpoint import load_whole
from p2pmodel.engine.evaluation import attached
from p2pmodel.engine.training.loop import TrainingOptions
from p2pmodel.node.asking.client import Sampling, SwarmClient
from p2pmodel.node.asking.distributed import _leave
from p2pmodel.node.lineages.bases import find_base
from p2pmodel.node.lineages.states import patch_file_state
from p2pmodel.node.patches.apprentice import ThroughSwarm
from p2pmodel.node.patches.contributing import ALONE, Assignment, estimate, train_patch
from p2pmodel.tensors.kinds import get_kind
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    with LocalSwarm(tmp_path_factory.mktemp("swarm")) as swarm:
        first = swarm.start("first", "--layers", "0:3", "--threads", "1")
        swarm.wait_until_serving()
        swarm.start("second", "--layers", "3:6", "--threads", "1", "--peers", first.address)
        swarm.wait_until_serving()
        yield [first.address]


@pytest.fixture(scope="module")
def model(peers: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with DistributedModelForCausalLM.from_swarm(peers=peers, codec="fp32", home=tmp_path_factory.mktemp("home")) as m:
        yield m


@pytest.fixture(scope="module")
def whole() -> PreTrainedModel:
    return load_whole(starter.MODEL)


def batch(model: Any) -> dict[str, Tensor]:
    model.tokenizer.padding_side = "left"
    texts = ["def read_lines(path):", "import os", "class Node:\n    def __init__(self):"]
    encoded = model.tokenizer(texts, return_tensors="pt", padding=True)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def test_it_is_the_family_s_own_model(model: Any, whole: PreTrainedModel) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in whole.parameters()) / 2
    inputs = batch(model)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits[real], whole(**inputs).logits[real])
        ids = inputs["input_ids"][2:]
        assert torch.equal(model(ids, labels=ids).loss, whole(ids, labels=ids).loss)


def test_it_generates_what_the_whole_model_generates(model: Any, whole: PreTrainedModel) -> None:
    inputs = batch(model)
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 5}):
        answers = []
        for generating in (model, whole):
            torch.manual_seed(7)
            answers.append(generating.generate(**inputs, max_new_tokens=20, **options))
        assert torch.equal(*answers)


def test_a_streamer_is_given_what_is_generated(
    model: Any, whole: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = batch(model)["input_ids"][2:]
    streamer = TextStreamer(model.tokenizer, skip_prompt=True)
    answer = model.generate(ids, max_new_tokens=20, do_sample=False, streamer=streamer)
    assert capsys.readouterr().out.strip() == model.tokenizer.decode(answer[0, ids.shape[1] :]).strip()


def test_a_draft_and_a_long_prompt_leave_the_answer_as_it_is(model: Any, whole: PreTrainedModel) -> None:
    text = (starter.MODEL / "README.md").read_text()
    ids = model.tokenizer(text, return_tensors="pt").input_ids[:, :400]
    expected = whole.generate(ids, max_new_tokens=24, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=24, do_sample=False), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=whole), expected)


def test_a_prompt_that_the_stages_know_is_not_computed_again(peers: list[str], tmp_path: Path) -> None:
    text = (starter.DOMAINS / "xml.txt").read_text()[:900]
    answers, alone = [], "import os\n"
    with SwarmClient.connect(tmp_path, tuple(peers), None, None) as client:
        for prompt in (text, alone, text, text + "\n\ndef f(x):"):
            answers.append(client.generate(prompt, Sampling(12), "head", "fp16", lambda _: None))
        other = client.generate(text, Sampling(12), "head", "fp32", lambda _: None)
    with SwarmClient.connect(tmp_path, tuple(peers), None, None) as somebody_else:
        answers.append(somebody_else.generate(text, Sampling(12), "head", "fp16", lambda _: None))
    assert [answer.reused_tokens > 100 for answer in answers] == [False, False, True, True, True]
    assert other.reused_tokens == 0
    assert answers[0].text == answers[2].text == answers[4].text
    assert answers[2].bytes_sent < answers[0].bytes_sent / 3


@pytest.fixture(scope="module")
def trainable(peers: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    home = tmp_path_factory.mktemp("home")
    with DistributedModelForCausalLM.from_swarm(peers=peers, codec="fp32", trainable=True, home=home) as m:
        yield m


def test_vectors_are_trained_with_any_optimiser(trainable: Any, whole: PreTrainedModel) -> None:
    inputs = batch(trainable)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    names, parameters = zip(*trainable.named_parameters(), strict=True)
    ours = [p for p in parameters if p.requires_grad]
    assert all(name.startswith("vectors.") == p.requires_grad for name, p in zip(names, parameters, strict=True))
    assert ours
    state = {name: torch.ones_like(p, requires_grad=True) for name, p in trainable.vectors.state().items()}
    kind = get_kind("ia3@1")
    applier = kind.applier(whole.base_model, sorted(state))
    whole.requires_grad_(False)
    optimisers = [torch.optim.SGD(ours, lr=0.5), torch.optim.SGD(list(state.values()), lr=0.5)]
    try:
        for _ in range(3):
            loss = trainable(**inputs).loss
            with applier.use(state):
                expected = whole(**inputs, use_cache=False).loss
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
            for one, optimiser in zip((loss, expected), optimisers, strict=True):
                optimiser.zero_grad()
                one.backward()
                optimiser.step()
        for name, vector in trainable.vectors.state().items():
            torch.testing.assert_close(vector.grad, state[name].grad, rtol=1e-3, atol=1e-6)
        # What is generated and evaluated, without gradients, is by the same vectors.
        with torch.no_grad(), applier.use(state):
            torch.testing.assert_close(trainable(**inputs).loss, whole(**inputs, use_cache=False).loss)
            ids = inputs["input_ids"][2:]
            answers = [m.generate(ids, max_new_tokens=12, do_sample=False) for m in (trainable, whole)]
        assert torch.equal(*answers)
    finally:
        applier.remove()


def test_a_patch_is_trained_through_the_swarm_as_on_one_machine(peers: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((starter.MODEL / "README.md").read_text())
    options = TrainingOptions(steps=4, batch=3, sequence=48, fisher_examples=4, checkpoint_every=2, seed=1)
    with SwarmClient.connect(tmp_path / "home", tuple(peers), None, None) as client:
        lineage = client.lineage
        base = find_base(lineage.home, lineage)
        assignment = Assignment(lineage, base, lineage.head, "ia3@1", (text,), options=options, restart=True)
        seconds = estimate(assignment, ThroughSwarm(client, "fp32")).seconds
        patches = [
            train_patch(replace(assignment, fresh=True), tmp_path / name, lambda step: None, workplace)
            for name, workplace in (("far", ThroughSwarm(client, "fp32")), ("near", ALONE))
        ]
        state = patch_file_state(lineage, tmp_path / "far")
        answer = client.generate("import ", Sampling(8), "head", "fp32", lambda _: None, str(tmp_path / "far"))
    assert seconds > 0
    far, near = (patch.trained for patch in patches)
    assert far.loss_before == pytest.approx(near.loss_before, rel=1e-5)
    assert far.loss_after == pytest.approx(near.loss_after, rel=1e-4)
    for name, vector in far.adapter.items():
        torch.testing.assert_close(vector, near.adapter[name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(far.fisher[name], near.fisher[name], rtol=1e-2, atol=1e-4)
    whole, kind = load_whole(starter.MODEL), get_kind("ia3@1")
    with attached(whole, kind, state) as applier, applier.use(state):
        ids = client.encode("import ")
        expected = whole.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert answer.text == client.tokenizer.decode(expected, skip_special_tokens=True)


def test_after_it_is_closed_it_says_so(peers: list[str], tmp_path: Path) -> None:
    model = DistributedModelForCausalLM.from_swarm(peers=peers, home=tmp_path)
    model.close()
    model.close()
    with pytest.raises(NotRunning, match="left the swarm"):
        model(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("collected", [False, True], ids=["closed", "collected"])
def test_its_end_may_come_in_the_thread_of_its_own_loop(peers: list[str], tmp_path: Path, collected: bool) -> None:
    client = SwarmClient.connect(tmp_path, tuple(peers), None, None)

    async def end() -> None:
        _leave(client) if collected else client.close()

    client._loop.submit(end())
    until(lambda: client._loop.closed and not client._loop._thread.is_alive())
    with pytest.raises(NotRunning, match="left the swarm"):
        client.look()
