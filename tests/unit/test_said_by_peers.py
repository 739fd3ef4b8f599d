"""Whatever a peer signs about itself, and decodes, can be shown: by status, by the page, and by the metrics."""

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from p2pmodel.cli.status_text import status_data, status_text
from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.experts import ExpertLease
from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.model import MAX_TEXT, Manifest
from p2pmodel.domain.swarm import LEAST_SECONDS, MOST_SECONDS, Lease, LineageOffer, Presence, Span, as_claimed
from p2pmodel.logic.expert_placement import choose_experts
from p2pmodel.logic.experts import hosts_of
from p2pmodel.logic.placement import Supply, choose_span
from p2pmodel.logic.routing import coverage
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.service import expert_lease_status, lease_status, presence_status
from p2pmodel.node.watching.expert_view import hosted_view
from p2pmodel.node.watching.gauges import show_swarm
from p2pmodel.node.watching.overview import Overview
from p2pmodel.telemetry.metrics import Metrics
from p2pmodel.wire import canonical, records
from p2pmodel.wire.signing import Key
from p2pmodel.wire.v1 import control_pb2 as pb
from tests.support.factories import manifest
from tests.support.lineages import begin

METRICS = Metrics()
KEY, OTHER = Key.generate(), Key.generate()
MODEL = canonical.digest(b"model")
FAR = 4e12
"""Expires after whenever this runs."""

numbers = st.sampled_from([-1, 0, 1, 2, 6, 100, 65_535, 65_536, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
figures = st.one_of(
    st.sampled_from([0.0, 5e-324, 1e-9, 1e-3, 60.0, 61.0, 1e300, math.inf, -math.inf, math.nan, FAR]), st.floats()
)
texts = st.one_of(
    st.sampled_from(["", "fp32", "\x1b[2J", "a\nb", "x" * 300, "$(reboot)", "/ip4/192.0.2.1/tcp/1; reboot"]),
    st.text(max_size=20),
)
spans = st.fixed_dictionaries({"start": numbers, "end": numbers})
some_numbers = st.lists(st.one_of(numbers, st.integers(0, 130)), max_size=4)
versions = st.lists(st.sampled_from([MODEL, canonical.digest(b"unheard")]), max_size=17)
COMMON = {"span": spans, "dtype": texts, "versions": versions, "queue": numbers, "leaving": st.booleans()}
LEASE = {
    **COMMON,
    "layer_seconds": figures,
    "expires": figures,
    "delays": st.lists(st.tuples(st.sampled_from([KEY.peer, OTHER.peer, "x"]), figures), max_size=2),
    "moving": st.one_of(st.none(), spans),
}
EXPERTS = {
    **COMMON,
    "pair_seconds": figures,
    "expires": figures,
    "experts": some_numbers,
    "loads": some_numbers,
    "coming": some_numbers,
    "going": some_numbers,
}
PRESENCE = {
    "addresses": st.lists(texts, max_size=3),
    "gossip_peer": texts,
    "gossip_addresses": st.lists(texts, max_size=3),
    "roles": st.lists(texts, max_size=3),
    "software": texts,
    "expires": figures,
}

one_lease = Lease(KEY.peer, MODEL, Span(0, 3), "fp32", (MODEL,), 1e-3, 1, False, FAR)
one_expert_lease = ExpertLease(KEY.peer, MODEL, Span(0, 3), (0, 1), "fp32", (MODEL,), 1e-3, 1, False, FAR)
one_presence = Presence(
    KEY.peer, MODEL, (f"/ip4/192.0.2.1/tcp/1/p2p/{KEY.peer}",), "Q", (), ("host",), "p2pmodel/1", FAR
)


@pytest.fixture(scope="module")
def lineage(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    return begin(tmp_path_factory.mktemp("said") / "home")


def changed(noun: Any, fields: Mapping[str, st.SearchStrategy[Any]], draw: st.DataObject) -> bytes:
    """The canonical bytes of the noun with one or two fields of somebody else's choice."""
    names = draw.draw(st.sets(st.sampled_from(sorted(fields)), min_size=1, max_size=2))
    said = canonical.decode(canonical.encode(noun), dict, 1 << 16)
    return canonical.encode({**said, **{name: draw.draw(fields[name]) for name in sorted(names)}})


def said(noun: Any, fields: Mapping[str, st.SearchStrategy[Any]], draw: st.DataObject) -> Any:
    """What of it decodes."""
    try:
        return canonical.decode(changed(noun, fields, draw), type(noun), records.MAX_DHT_BYTES)
    except Rejected:
        assume(False)


def ref(version: VersionId) -> pb.VersionRef:
    return pb.VersionRef(id=version)


def show(lineage: Lineage, leases: list[Lease], experts: list[ExpertLease], presences: list[Presence]) -> None:
    layers = lineage.manifest.layers
    model = pb.ModelStatus(
        layers=layers,
        leases=[lease_status(lease, ref) for lease in leases],
        expert_leases=[expert_lease_status(lease, ref) for lease in experts],
        presences=[presence_status(presence) for presence in presences],
        coverage=coverage(leases, layers, VersionId(MODEL)),
        expert_hosts=hosts_of(experts, layers),
    )
    reply = pb.StatusReply.FromString(pb.StatusReply(models=[model]).SerializeToString())
    json.dumps(status_data(reply), allow_nan=False)
    assert all(line.isprintable() for line in status_text(reply).split("\n"))
    overview = Overview(lineage)
    page = overview.view(leases, presences) | {"hosted": hosted_view(experts, layers, overview.named)}
    json.dumps(page, allow_nan=False).encode()
    show_swarm(METRICS, lineage, leases, VersionId(lineage.model), len(presences))
    assert b"p2pmodel_leases" in METRICS.exposition()


some = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@some
@given(draw=st.data())
def test_any_lease_can_be_shown_and_reckoned_with(lineage: Lineage, draw: st.DataObject) -> None:
    lease = said(one_lease, LEASE, draw)
    show(lineage, [lease], [], [])
    supply = Supply([lease], 6)
    left = supply.without(lease.peer)
    assert all(math.isfinite(rate) and rate >= 0 for rate in (*supply.rates, *left.rates))
    choose_span([lease], 6, 2, salt=OTHER.peer)


@some
@given(draw=st.data())
def test_any_lease_of_experts_can_be_shown_and_reckoned_with(lineage: Lineage, draw: st.DataObject) -> None:
    lease = said(one_expert_lease, EXPERTS, draw)
    show(lineage, [], [lease], [])
    choose_experts([lease], (0, 1, 5), 8, 2, salt=OTHER.peer)


@some
@given(draw=st.data())
def test_any_presence_can_be_shown(lineage: Lineage, draw: st.DataObject) -> None:
    show(lineage, [], [], [said(one_presence, PRESENCE, draw)])


@pytest.mark.parametrize(
    ("noun", "field", "value"),
    [
        (one_lease, "queue", 2**40),
        (one_lease, "dtype", "fp32\x1b[2J"),
        (one_lease, "dtype", ""),
        (one_lease, "layer_seconds", 1e300),
        (one_lease, "layer_seconds", 5e-324),
        (one_lease, "span", {"start": 60_000, "end": 2**32}),
        (one_lease, "moving", {"start": 0, "end": 2**32}),
        (one_expert_lease, "queue", 2**40),
        (one_expert_lease, "dtype", "bf16\r"),
        (one_expert_lease, "pair_seconds", 61.0),
        (one_expert_lease, "pair_seconds", 5e-324),
        (one_expert_lease, "span", {"start": 0, "end": 2**32}),
        (one_presence, "addresses", ["/ip4/192.0.2.1/tcp/1; reboot"]),
        (one_presence, "addresses", ["/ip4/192.0.2.1/tcp/$(reboot)"]),
        (one_presence, "addresses", ["--swarm-key"]),
        (one_presence, "gossip_addresses", ["/ip4/192.0.2.1\n/tcp/1"]),
        (one_presence, "roles", ["host\nmaintainer"]),
        (one_presence, "software", "\x1b]0;owned\x07"),
        (one_presence, "gossip_peer", "\x00"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_what_no_peer_says_of_itself(noun: Any, field: str, value: Any) -> None:
    fields = canonical.decode(canonical.encode(noun), dict, 1 << 16)
    assert canonical.decode(canonical.encode(fields), type(noun), 1 << 16) == noun
    with pytest.raises(Rejected) as caught:
        canonical.decode(canonical.encode({**fields, field: value}), type(noun), 1 << 16)
    assert caught.value.reason == "schema"


def test_an_offer_has_a_name_that_a_manifest_could_have() -> None:
    offer = {"model": MODEL, "name": "good", "manifest": {"digest": MODEL, "size": 1}, "head": MODEL}
    assert canonical.decode(canonical.encode(offer), LineageOffer, 1 << 16).name == "good"
    with pytest.raises(Rejected):
        canonical.decode(canonical.encode({**offer, "name": "good\x1b[2J"}), LineageOffer, 1 << 16)


def test_what_was_measured_can_be_said() -> None:
    assert [as_claimed(seconds) for seconds in (0.0, 1e-3, 1e9)] == [LEAST_SECONDS, 1e-3, MOST_SECONDS]


@pytest.mark.parametrize("field", ["architecture", "source", "licence"])
def test_a_manifest_says_nothing_that_steers_a_terminal(field: str) -> None:
    said = canonical.decode(canonical.encode(manifest(KEY)), dict, 1 << 16)
    for text in ("MIT\x1b[2J", "a\nb", "x" * (MAX_TEXT + 1)):
        with pytest.raises(Rejected):
            canonical.decode(canonical.encode({**said, field: text}), Manifest, 1 << 16)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("field", ["open_seconds", "proposer_seconds", "verdict_seconds"])
def test_a_round_ends(field: str, seconds: float) -> None:
    said = canonical.decode(canonical.encode(manifest(KEY)), dict, 1 << 16)
    with pytest.raises(Rejected):
        canonical.decode(
            canonical.encode({**said, "schedule": {**said["schedule"], field: seconds}}), Manifest, 1 << 16
        )
