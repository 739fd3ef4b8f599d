"""Maintainers in real processes: one is down, one is killed and asked, one signs twice, one comes and one goes."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from p2pmodel import starter
from p2pmodel.cli.app import app
from p2pmodel.cli.localswarm import LocalSwarm, NodeProcess
from p2pmodel.domain.errors import P2PModelError
from p2pmodel.domain.ids import PatchId, VersionId
from p2pmodel.domain.model import Schedule
from p2pmodel.domain.version import Verdict
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.node.lineages.founding import Founding, found
from p2pmodel.node.lineages.intake import store
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import patch_file_state, version_state
from p2pmodel.node.patches.contributing import Assignment, train_patch
from p2pmodel.store.home import Home
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.support.lineages import add_patch_of, begin, grow
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(400)

PLAIN = ("--layers", "none", "--threads", "1")
SCHEDULE = Schedule(min_patches=1, open_seconds=60.0, proposer_seconds=6.0, verdict_seconds=120.0)


def run(home: Path, *arguments: str) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--home", str(home), "--json"])
    if isinstance(result.exception, P2PModelError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


class Council:
    """Homes of maintainers, of whom `threshold` have to accept, and the lineage that all of them know."""

    def __init__(self, folder: Path, maintainers: int = 3, threshold: int = 2) -> None:
        self.folder = folder
        homes = [Home.open(folder / f"m{n + 1}") for n in range(maintainers)]
        exam = folder / "exam"
        exam.mkdir()
        rows = (starter.EXAM / "xml.test.jsonl").read_text().splitlines()[:2]
        for split in ("tune", "test"):
            (exam / f"xml.{split}.jsonl").write_text("\n".join(rows) + "\n")
        (exam / "exam.toml").write_text('[[domain]]\nname = "xml"\ntune = "xml.tune.jsonl"\ntest = "xml.test.jsonl"\n')
        keys = tuple(home.key.peer for home in homes)
        founding = Founding("council", keys, threshold, exam, licence=starter.LICENCE, schedule=SCHEDULE)
        self.lineages = [found(homes[0], starter.MODEL, founding)]
        self.learned = self._learn(folder, rows)
        record = homes[0].objects.load(self.lineages[0].model)
        for home in homes[1:]:
            home.objects.put(homes[0].objects.load(self.lineages[0].manifest.exam.digest))
            self.lineages.append(Lineage.create(home, record))
        self.model = self.lineages[0].model

    def _learn(self, folder: Path, rows: list[str]) -> dict[str, torch.Tensor]:
        """By how much the slots move when the exam itself is learned: whatever part of it a patch takes, it helps."""
        data = folder / "exam.txt"
        data.write_text("".join(json.loads(row)["text"] for row in rows))
        lineage = self.lineages[0]
        options = TrainingOptions(steps=8, sequence=64, fisher_examples=1, learning_rate=0.02)
        assignment = Assignment(lineage, starter.MODEL, lineage.head, "ia3@1", (data,), options=options)
        train_patch(assignment, folder / "exam.p2patch", lambda step: None)
        learned, base = patch_file_state(lineage, folder / "exam.p2patch"), version_state(lineage, lineage.model)
        return {slot: learned[slot] - base[slot] for slot in base}

    def patch(self, node: NodeProcess, layers: range) -> PatchId:
        """On the head, published through the node: what was learned in some layers."""
        lineage = Lineage(Home.open(node.home), self.model)
        state = version_state(lineage, lineage.head)
        for slot in state:
            if any(f"layers.{layer}." in slot for layer in layers):
                state[slot] = state[slot] + self.learned[slot]
        patch = add_patch_of(lineage, Key.generate(), state)
        with node.control() as client:
            client.publish(patch)
        return patch


@pytest.fixture(scope="module")
def council(tmp_path_factory: pytest.TempPathFactory) -> Council:
    return Council(tmp_path_factory.mktemp("council"))


@pytest.fixture(scope="module")
def swarm(council: Council) -> Iterator[LocalSwarm]:
    with LocalSwarm(council.folder) as swarm:
        first = swarm.start("m1", "--model", council.model, *PLAIN, "--maintain")
        first.wait_until_serving(time.monotonic() + 90)
        swarm.start("m2", "--model", council.model, *PLAIN, "--maintain", "--peers", first.address)
        swarm.wait_until_serving()
        yield swarm


def candidates(node: NodeProcess) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run(node.home, "round", "show", "--model", "council")["candidates"]
    return found


def test_two_of_three_are_enough(council: Council, swarm: LocalSwarm) -> None:
    council.patch(swarm.nodes["m1"], range(3))
    swarm.wait_for_head("1.0.1", 120)
    lineage = Lineage(Home.open(swarm.nodes["m2"].home), council.model)
    assert len(lineage.versions[0].verdicts) == 2


def test_a_maintainer_that_is_killed_goes_on_where_it_was_and_asks(council: Council, swarm: LocalSwarm) -> None:
    first, second = swarm.nodes["m1"], swarm.nodes["m2"]
    second.kill()
    council.patch(first, range(3, 6))
    again = swarm.start("m2", "--model", council.model, *PLAIN, "--maintain", "--ask", "--peers", first.address)
    again.wait_until_serving(time.monotonic() + 90)
    waiting = until(lambda: candidates(again))[-1]
    until(lambda: "waits for your word" in again.log.read_text())
    assert [v.candidate.number for v in Lineage(Home.open(again.home), council.model).versions][-1].patch == 1
    said = run(again.home, "round", "approve", waiting["version"][:12], "--model", "council")
    assert said["decision"] == "approved"
    swarm.wait_for_head("1.0.2", 120)


def test_who_signs_twice_is_shown_to_everybody_with_the_proof(council: Council, swarm: LocalSwarm) -> None:
    liar, first, second = council.lineages[2], swarm.nodes["m1"], swarm.nodes["m2"]
    held = Lineage(Home.open(first.home), council.model)
    for text in (b"one", b"other"):
        false = Verdict(liar.home.key.peer, council.model, 99, VersionId(canonical.digest(text)), True, "", ())
        record = store(held, "verdict", liar.home.key.sign("verdict", false), ())
        with first.control() as client:
            client.publish(record.digest)
    shown = until(lambda: run(second.home, "round", "show", "--model", "council")["double_signers"])
    assert shown[0]["maintainer"] == liar.home.key.peer
    proof = [second.home / "objects" / digest[:2] / digest[2:] for digest in shown[0]["verdicts"]]
    assert len(proof) == 2
    assert all(path.exists() for path in proof)


def test_a_maintainer_comes_and_one_goes(council: Council, swarm: LocalSwarm) -> None:
    first, second = swarm.nodes["m1"], swarm.nodes["m2"]
    joining = swarm.start("new", "--model", council.model, *PLAIN, "--peers", first.address)
    joining.wait_until_serving(time.monotonic() + 90)
    new, gone = Home.open(joining.home).key.peer, council.lineages[2].home.key.peer
    changes = ["--add-maintainer", new, "--remove-maintainer", gone, "--threshold", "3", "--tolerance", "0.02"]
    proposed = run(first.home, "model", "amend", *changes, "--model", "council")["id"]
    until(lambda: all(any(c["version"] == proposed for c in candidates(node)) for node in (second, joining)))
    run(second.home, "round", "approve", proposed, "--model", "council")
    until(lambda: any(len(c["accepts"]) == 2 for c in candidates(joining)))
    assert Lineage(Home.open(joining.home), council.model).manifest.threshold == 2
    run(joining.home, "round", "approve", proposed, "--model", "council")
    swarm.wait_for_head("1.0.3", 120)
    for node in (first, second, joining):
        manifest = Lineage(Home.open(node.home), council.model).manifest
        assert gone not in manifest.maintainers
        assert new in manifest.maintainers
        assert manifest.threshold == 3
        assert manifest.limits.regression_tolerance == 0.02


def test_a_late_comer_verifies_the_chain_and_arrives_at_the_head(council: Council, swarm: LocalSwarm) -> None:
    late = swarm.start("late", "--model", council.model, *PLAIN, "--peers", swarm.nodes["m1"].address)
    late.wait_until_serving(time.monotonic() + 90)
    swarm.wait_for_head("1.0.3", 60)
    lineage = Lineage(Home.open(late.home), council.model)
    assert lineage.manifest.threshold == 3
    assert run(late.home, "version", "verify", "--model", "council")
    said = CliRunner().invoke(app, ["log", "--model", "council", "--home", str(late.home)]).stdout
    assert "amends maintainer " in said
    until(lambda: lineage.home.objects.has(lineage.manifest.exam.digest))


def test_who_was_away_for_ten_rounds_catches_up(tmp_path: Path) -> None:
    full = begin(tmp_path / "full")
    away = Home.open(tmp_path / "away")
    Lineage.create(away, full.home.objects.load(full.model))
    grow(full, 10)
    with LocalSwarm(tmp_path) as swarm:
        node = swarm.start("full", "--model", full.model, *PLAIN)
        node.wait_until_serving(time.monotonic() + 90)
        swarm.start("away", "--model", full.model, *PLAIN, "--peers", node.address)
        swarm.wait_until_serving()
        until(lambda: str(_number(away, full.model)) == "1.0.10")
    caught_up = Lineage(away, full.model)
    assert [v.id for v in caught_up.versions] == [v.id for v in full.versions]
    assert run(tmp_path / "away", "version", "verify", "--model", full.model)


def _number(home: Home, model: str) -> object:
    lineage = Lineage(home, model)  # type: ignore[arg-type]
    return lineage.number(lineage.head)
