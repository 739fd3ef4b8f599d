"""Rounds of five maintainers in real processes, four of whom have to accept, with faults in the middle: one is down,
one is cut off for a while, one is killed while it works."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from p2pmodel.cli.localswarm import LocalSwarm, NodeProcess
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.store.home import Home
from tests.integration.test_maintainers import PLAIN, Council
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def council(tmp_path_factory: pytest.TempPathFactory) -> Council:
    return Council(tmp_path_factory.mktemp("council"), maintainers=5, threshold=4)


def start(council: Council, swarm: LocalSwarm, name: str) -> NodeProcess:
    known = ("--peers", swarm.nodes["m1"].address) if swarm.nodes else ()
    return swarm.start(name, "--model", council.model, *PLAIN, "--maintain", *known)


@pytest.fixture(scope="module")
def swarm(council: Council) -> Iterator[LocalSwarm]:
    """Four of the five; nothing is ever heard of the fifth."""
    with LocalSwarm(council.folder) as swarm:
        start(council, swarm, "m1").wait_until_serving(time.monotonic() + 90)
        for name in ("m2", "m3", "m4"):
            start(council, swarm, name)
        swarm.wait_until_serving()
        yield swarm


def seen_by(council: Council, name: str) -> Lineage:
    return Lineage(Home.open(council.folder / name), council.model)


def accepting(lineage: Lineage, number: str) -> set[str]:
    """The maintainers who accept a candidate with that number."""
    wanted = [version for version, candidate in lineage.candidates.items() if str(candidate.number) == number]
    return {v.maintainer for v in lineage.verdicts.values() if v.version in wanted and v.accept}


@contextmanager
def cut_off(node: NodeProcess) -> Iterator[None]:
    """All of its processes stand still, as on a machine that is suspended: what is sent to it waits."""
    os.killpg(node.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(node.process.pid, signal.SIGCONT)


def test_four_of_five_are_enough(council: Council, swarm: LocalSwarm) -> None:
    council.patch(swarm.nodes["m1"], range(2))
    swarm.wait_for_head("1.0.1", 120)
    assert len(seen_by(council, "m2").versions[0].verdicts) == 4


def test_a_maintainer_that_was_cut_off_makes_up_for_it(council: Council, swarm: LocalSwarm) -> None:
    with cut_off(swarm.nodes["m4"]):
        council.patch(swarm.nodes["m1"], range(2, 4))
        until(lambda: len(accepting(seen_by(council, "m1"), "1.0.2")) == 3)
        assert len(seen_by(council, "m1").versions) == 1
        assert len(seen_by(council, "m4").patches) == 1
    swarm.wait_for_head("1.0.2", 120)


def test_a_maintainer_that_is_killed_while_it_works_goes_on_and_signs_once(council: Council, swarm: LocalSwarm) -> None:
    third = swarm.nodes["m3"]
    council.patch(swarm.nodes["m1"], range(4, 6))
    until(lambda: len(seen_by(council, "m3").patches) == 3)
    third.kill()
    start(council, swarm, "m3").wait_until_serving(time.monotonic() + 90)
    swarm.wait_for_head("1.0.3", 120)
    lineage = seen_by(council, "m1")
    signed = [(verdict.maintainer, verdict.round) for verdict in lineage.verdicts.values()]
    assert len(signed) == len(set(signed))
