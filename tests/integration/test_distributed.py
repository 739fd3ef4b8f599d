"""The Python API over real nodes: the family's own CausalLM, against the same model in this process."""

from collections.abc import Iterator
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
from p2pmodel.node.client import Sampling, SwarmClient

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
    text = (starter.MODEL / "README.md").read_text()[:900]
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


def test_after_it_is_closed_it_says_so(peers: list[str], tmp_path: Path) -> None:
    model = DistributedModelForCausalLM.from_swarm(peers=peers, home=tmp_path)
    model.close()
    model.close()
    with pytest.raises(NotRunning, match="left the swarm"):
        model(torch.tensor([[1, 2]]))
