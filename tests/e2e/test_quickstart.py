"""The main job, as a user runs it: `p2pmodel quickstart`, with real processes. What it prints has to be true."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from p2pmodel.domain.swarm import Span
from p2pmodel.node.lineages.lineage import known_lineages
from p2pmodel.store.fsck import fsck
from p2pmodel.store.home import Home

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("swarm")
    run = subprocess.run(
        [sys.executable, "-m", "p2pmodel", "quickstart", "--json", "--folder", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), folder


def test_no_process_is_left_behind(rehearsal: tuple[dict[str, Any], Path]) -> None:
    folder = str(rehearsal[1])
    left = [
        p.info
        for p in psutil.process_iter(["pid", "cmdline"])
        if any(folder in part for part in p.info["cmdline"] or [])
    ]
    assert left == []


def test_no_host_holds_the_whole_model(rehearsal: tuple[dict[str, Any], Path]) -> None:
    spans = [Span(*map(int, text.split(":"))) for text in rehearsal[0]["spans"].values()]
    assert len(spans) >= 3
    assert sum(map(len, spans)) == 6
    assert all(len(span) < 6 for span in spans)


def test_the_exam_loss_falls_in_every_round(rehearsal: tuple[dict[str, Any], Path]) -> None:
    report = rehearsal[0]
    means = [sum(exam.values()) / len(exam) for exam in (report["base_exam"], *(v["exam"] for v in report["versions"]))]
    assert len(means) == 3
    assert means[0] > means[1] > means[2], means


def test_no_domain_regresses_beyond_the_tolerance(rehearsal: tuple[dict[str, Any], Path]) -> None:
    report = rehearsal[0]
    exams = [report["base_exam"], *(v["exam"] for v in report["versions"])]
    for before, after in itertools.pairwise(exams):
        for domain, loss in before.items():
            assert after[domain] <= loss * 1.005, (domain, loss, after[domain])


def test_every_node_arrives_at_the_same_proven_head(rehearsal: tuple[dict[str, Any], Path]) -> None:
    report, folder = rehearsal
    heads = set()
    for home in folder.iterdir():
        if home.name == "client":
            continue
        (lineage,) = known_lineages(Home.open(home))
        assert lineage.served_head == lineage.head
        heads.add(lineage.head)
    assert heads == {report["versions"][-1]["id"]}


def test_the_patches_that_were_merged_are_in_every_store(rehearsal: tuple[dict[str, Any], Path]) -> None:
    report, folder = rehearsal
    for home in folder.iterdir():
        if home.name == "client":
            continue
        lineage = known_lineages(Home.open(home))[0]
        for version in lineage.versions:
            assert set(version.candidate.patches) <= lineage.patches.keys()
        assert not fsck(Home.open(home)).corrupt
    assert all(len(v["patches"]) == 3 for v in report["versions"])


def test_each_answer_was_given_by_the_version_of_its_time(rehearsal: tuple[dict[str, Any], Path]) -> None:
    answers = rehearsal[0]["answers"]
    assert [a["number"] for a in answers] == ["1.0.0", "1.0.1", "1.0.2"]
    assert all(a["tokens"] > 0 and a["text"].strip() and len(a["route"]["hops"]) == 3 for a in answers)
    assert len({a["text"] for a in answers}) > 1, "three versions gave the same answer: were they served?"
