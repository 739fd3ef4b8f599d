"""What a glance shows of a lineage that grows; the node around the lineage is a stand-in."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.swarm import Lease, Presence, Span
from p2pmodel.domain.version import LeftOut, Verdict
from p2pmodel.logic.round_state import Phase
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.watching.glance import Glance, Glancer
from p2pmodel.wire.signing import Key
from tests.support.lineages import add_patch, adopt, begin


@dataclass
class Surroundings:
    lineage: Lineage
    leases: list[Lease] = field(default_factory=list)
    presences: dict[str, Presence] = field(default_factory=dict)
    tokens: int = 0

    def __post_init__(self) -> None:
        me = self.lineage.home.key.peer
        host = SimpleNamespace(peer=me, addresses=(f"/ip4/127.0.0.1/tcp/7000/p2p/{me}",))
        state = SimpleNamespace(round=2, phase=Phase.OPEN, since=time.monotonic() - 5, patches=(), votes=())
        community = SimpleNamespace(round=state, presences=self.presences)
        self.glancer = Glancer(
            cast(Any, host), self.lineage, cast(Any, SimpleNamespace(leases=self.leases)), cast(Any, community), None
        )

    def look(self) -> Glance:
        return self.glancer.take()


def test_a_glance_follows_patches_verdicts_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lineage = begin(tmp_path)
    me, model = lineage.home.key, VersionId(lineage.model)
    around = Surroundings(lineage)
    assert not around.look().patches
    assert not around.look().versions
    assert around.look().coverage == (0,) * 6

    mine, theirs = add_patch(lineage, me, 1), add_patch(lineage, Key.generate(), 2)
    assert [(p.id, p.state) for p in around.look().patches] == [(mine, "waits for its round")]
    adopt(lineage, [mine, theirs])
    worse, better = add_patch(lineage, me, 3), add_patch(lineage, Key.generate(), 4)
    version = adopt(lineage, [better], [LeftOut(worse, "no better")])
    lineage.home.refs.set(f"models/{lineage.model}/head", version)
    glance = around.look()
    assert [p.state for p in glance.patches] == ["left out of 1.0.2: no better", "merged into 1.0.1"]
    shown = [(v.number, v.what, v.loss, v.before) for v in glance.versions]
    assert shown == [("1.0.2", "1 merged", 0.8, 0.9), ("1.0.1", "2 merged", 0.8, 0.9)]
    assert glance.head == "1.0.2"
    assert glance.phase_seconds >= 5

    other = Key.generate().peer
    span, never = Span(2, 4), time.time() + 30
    around.leases.append(Lease(other, lineage.model, span, "fp32", (version, model), 0.001, 0, False, never))
    around.presences[other] = Presence(other, lineage.model, (), "", (), ("host",), "", never)
    monkeypatch.setattr("p2pmodel.node.watching.glance.MOST_PATCHES", 1)
    glance = around.look()
    assert glance.coverage == (0, 0, 1, 1, 0, 0)
    assert [(p.peer, p.span, p.roles) for p in glance.peers] == [(other, "2:4", ("host",))]
    assert ([p.id for p in glance.patches], glance.patch_count) == ([worse], 2)


def test_a_glance_counts_the_verdicts_on_ones_patch_before_it_is_decided(tmp_path: Path) -> None:
    lineage = begin(tmp_path)
    patch = add_patch(lineage, lineage.home.key, 1)
    version = adopt(lineage, [patch])
    candidate = lineage.candidates[version]
    lineage.versions = ()  # as long as the threshold is not reached
    no = Verdict(Key.generate().peer, lineage.model, candidate.round, version, False, "worse", ())
    lineage.verdicts["0" * 64] = no  # type: ignore[index]
    (seen,) = Surroundings(lineage).look().patches
    assert (seen.state, seen.accepts, seen.rejects) == ("waits for its round", 1, 1)
