"""An expert in a swarm of real nodes: adopted in a round, served by two stages, removed."""

import json
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from p2pmodel import starter
from p2pmodel.cli.app import app
from p2pmodel.cli.localswarm import LocalSwarm
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole
from p2pmodel.engine.evaluation import attached
from p2pmodel.node.lineages.expert_shares import noted_shares
from p2pmodel.node.lineages.states import version_state
from p2pmodel.store.home import Home
from p2pmodel.tensors.kinds import Kinds
from p2pmodel.tensors.patch_kind import KindOptions
from tests.support.modular import KINDS, begin, contribute, small_trainings, write_domains

pytestmark = pytest.mark.timeout(400)
TOKENS = 12


def test_an_expert_comes_serves_and_goes(tmp_path: Path) -> None:
    texts = write_domains(tmp_path)
    lineage = begin(Home.open(tmp_path / "home"), texts)
    with small_trainings():
        contribute(lineage, Home.open(tmp_path / "contributor"), texts / "table.txt", KindOptions(expert="table"))
    prompt = "\n".join((texts / "table.txt").read_text().splitlines()[:3])

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments, "--home", str(tmp_path / "home")])
        assert result.exit_code == 0, result.output
        return result.stdout

    common = ("--model", lineage.model, "--threads", "1")
    with LocalSwarm(tmp_path) as swarm:
        first = swarm.start("home", *common, "--layers", "0:3", "--maintain")
        first.wait_until_serving(time.monotonic() + 120)
        swarm.start("other", *common, "--layers", "3:6", "--peers", first.address)
        swarm.wait_until_serving(120)
        swarm.wait_for_head("1.1.0", 120)
        asked = ("infer", prompt, "--max-new-tokens", str(TOKENS), "--codec", "fp32", "--peers", first.address)
        said = json.loads(run(*asked, "--explain", "--json"))
        data = ("--data", str(texts / "table.txt"), "--data", str(texts / "prose.txt"))
        stats = json.loads(run("expert", "stats", "--through-swarm", "--peers", first.address, *data, "--json"))
        run("expert", "remove", "table")
        swarm.wait_for_head("1.2.0", 120)
        without = json.loads(run(*asked, "--json"))
    lineage.refresh()
    assert [str(v.candidate.number) for v in lineage.versions] == ["1.1.0", "1.2.0"]
    shares = dict(said["experts"])
    assert shares.keys() == {"table", "none"}
    assert shares["table"] > 0.5
    assert len(said["route"]["hops"]) == 2
    assert stats["names"] == ["table", "none"]
    assert stats["rows"][0][1][0] > 0.5 > stats["rows"][1][1][0]
    assert said["text"] == answer(version_state(lineage, lineage.versions[0].id), prompt)
    assert without["text"] == answer({}, prompt)
    assert not without["experts"]
    listed = run("expert", "list", "--version", "1.1.0")
    assert "table" in listed
    heatmap = tmp_path / "shares.png"
    prose = str(texts / "prose.txt")
    run("expert", "stats", "--version", "1.1.0", "--data", prose, "--heatmap", str(heatmap), "--on-page")
    assert heatmap.read_bytes().startswith(b"\x89PNG")
    noted = noted_shares(lineage)
    assert noted is not None
    assert noted[0] == "1.1.0"
    assert noted[1].names == ("table", "none")
    assert noted[1].rows[0][0] == "prose.txt"
    assert "removes table" in run("log")


@torch.inference_mode()
def answer(state: dict[str, torch.Tensor], prompt: str) -> str:
    """Of the whole model on this machine, token by token."""
    model, tokenizer = load_whole(starter.MODEL), load_tokenizer(starter.MODEL)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    begin = ids.shape[1]
    with attached(model, Kinds(KINDS), state) as applier, applier.use(state):
        for _ in range(TOKENS):
            chosen = model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, chosen], dim=1)
    return str(tokenizer.decode(ids[0, begin:], skip_special_tokens=True))
