"""What people are shown of experts that are hosted apart."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from p2pmodel.cli.status_text import status_data, status_text
from p2pmodel.cli.watching import view
from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.experts import ExpertLease, load_of
from p2pmodel.domain.swarm import Span
from p2pmodel.logic.experts import asked_of, hosts_of
from p2pmodel.node.lineages.expert_shares import Shares, note_shares, noted_shares
from p2pmodel.node.watching.expert_view import hosted_view
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from p2pmodel.wire.v1 import control_pb2 as pb
from tests.support.lineages import begin

MODEL = canonical.digest(b"model")


def lease(experts: tuple[int, ...], span: Span, *, leaving: bool = False) -> ExpertLease:
    return ExpertLease(Key.generate().peer, MODEL, span, experts, "fp32", (MODEL,), 1e-4, 0, leaving, 1e9)


def test_an_expert_has_as_many_hosts_as_where_it_has_fewest() -> None:
    whole, half = Span(0, 4), Span(0, 2)
    assert hosts_of([], 4) == ()
    assert hosts_of([lease((0, 1), whole), lease((1, 2), half)], 4) == (1, 1, 0)
    assert hosts_of([lease((0, 1), whole), lease((1,), half), lease((1, 3), Span(2, 4))], 4) == (1, 2, 0, 0)
    assert hosts_of([lease((0,), whole), lease((0, 5), whole, leaving=True)], 4) == (1,)


def test_layers_that_the_model_does_not_have_count_for_nothing() -> None:
    beyond = replace(lease((0, 40), Span(60_000, 60_001)), loads=(load_of(9.0),) * 2)
    some = [lease((0, 1), Span(1, 4)), lease((0, 1), Span(1, 60_000)), beyond]
    assert hosts_of(some, 4) == (2, 2)
    assert asked_of(some, 4) == (0.0, 0.0)
    assert hosts_of([beyond], 4) == ()
    assert hosted_view([beyond], 4, lambda version: {}) is None


def test_the_page_is_told_what_leases_say() -> None:
    whole, half = Span(0, 4), Span(2, 4)
    asked = replace(lease((0, 1), whole), loads=(load_of(2.0), load_of(8.0)), coming=(3,), going=(0,))
    leases = [replace(lease((1, 2), half), loads=(load_of(4.0), 0)), asked]
    view = hosted_view(leases, 4, lambda version: {"id": version, "number": "1.0.0"})
    assert view is not None
    assert json.loads(json.dumps(view)) == view
    assert view["hosts"] == [1, 1, 0]
    assert view["asked"] == [2.0, 12.0, 0.0]
    first, second = view["leases"]
    assert (first["peer"], first["experts"], first["coming"], first["going"]) == (asked.peer, "0-1", "3", "0")
    assert first["asked"] == 10.0
    assert (second["start"], second["end"], second["versions"][0]["number"]) == (2, 4, "1.0.0")
    assert hosted_view([], 4, lambda version: {}) is None


@pytest.fixture
def reply() -> pb.StatusReply:
    some = pb.ExpertLeaseStatus(
        peer="12D3KooWabcdefgh",
        span=pb.Span(start=0, end=4),
        experts=[0, 1, 2, 5],
        versions=[pb.VersionRef(id=MODEL, number="1.0.0")],
        dtype="fp32",
        pair_seconds=0.0002,
        rows_per_second=[1.0, 7.5, 0.0, 1.5],
        coming=[3],
        going=[0],
    )
    model = pb.ModelStatus(
        id=MODEL, name="mixture", layers=4, coverage=[1, 1, 1, 1], expert_leases=[some], expert_hosts=[1, 1, 1, 0, 0, 1]
    )
    return pb.StatusReply(peer="12D3KooWabcdefgh", models=[model])


def test_status_says_who_hosts_which_experts_and_how_often_they_are_asked(reply: pb.StatusReply) -> None:
    text = status_text(reply)
    assert "experts   111001   (how many peers host each)" in text
    assert (
        "0-2, 5 of 0:4  12D3KooWabcdefgh  1.0.0  fp32, 0.20 ms a row, 10.0 rows a second and layer, 7.5 of them for "
        "expert 1, exchanging 0 for 3  this node" in text
    )
    assert status_data(reply)["models"][0]["expert_leases"][0]["rows_per_second"] == [1.0, 7.5, 0.0, 1.5]
    del reply.models[0].expert_leases[0].rows_per_second[:]
    assert "rows not told" in status_text(reply)


def test_what_peers_say_does_not_steer_the_terminal(reply: pb.StatusReply) -> None:
    (model,) = reply.models
    model.leases.add(peer="12D3KooWabcdefgh", span=pb.Span(start=0, end=4), dtype="fp32\x1b[2J\r")
    model.expert_leases[0].dtype = "\x1b]0;owned\x07\u202e"
    model.presences.add(peer="12D3KooWabcdefgh", roles=["host\nround 9: adopted", "\x9b31m"])
    reply.addresses.append("/ip4/192.0.2.1\x1b[2J")
    reply.software = "p2pmodel\x08"
    text = status_text(reply)
    assert all(line.isprintable() for line in text.split("\n"))
    assert "\nround 9" not in text


def test_the_live_status_does_too(reply: pb.StatusReply) -> None:
    console = Console(width=140, record=True, file=StringIO())
    console.print(view(reply))
    shown = console.export_text()
    assert "0-2, 5 (-0 +3)" in shown
    assert "10.0" in shown


def test_where_experts_are_in_their_layers_nothing_is_said(reply: pb.StatusReply) -> None:
    del reply.models[0].expert_leases[:]
    del reply.models[0].expert_hosts[:]
    assert "experts" not in status_text(reply)


def test_shares_that_are_none_are_neither_noted_nor_shown(tmp_path: Path) -> None:
    lineage = begin(tmp_path / "home")
    good = Shares(("law", "none"), (("law.txt", (0.75, 0.25)),))
    note_shares(lineage, "1.1.0", good)
    assert noted_shares(lineage) == ("1.1.0", good)
    for share in (float("nan"), float("inf"), -0.5, 1.5):
        with pytest.raises(InvalidInput, match="not from 0 to 1"):
            note_shares(lineage, "1.1.0", Shares(("law", "none"), (("law.txt", (share, 0.25)),)))
    assert noted_shares(lineage) == ("1.1.0", good)
    old = {"number": "1.1.0", "names": ["law", "none"], "rows": [["law.txt", [float("nan"), 0.25]]]}
    lineage.home.refs.set(f"models/{lineage.model}/shares", json.dumps(old))
    assert noted_shares(lineage) is None
