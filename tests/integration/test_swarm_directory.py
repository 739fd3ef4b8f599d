"""Leases and presences in a DHT of real peers, some of them hostile."""

import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import pytest_asyncio
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.utils.timed_storage import ValueWithExpiration

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import ModelId
from p2pmodel.domain.swarm import LEASE_SECONDS
from p2pmodel.swarm import dht
from p2pmodel.swarm.directory import Directory
from p2pmodel.swarm.host import PeerHost
from p2pmodel.swarm.validator import RecordValidator, dht_key
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.support.swarm import Members, lease, presence, swarm

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def members(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Members]:
    """The last one is a client of the DHT."""
    async with swarm(tmp_path_factory.mktemp("keys"), 4, clients=[3]) as members:
        yield members


@pytest.fixture
def model() -> ModelId:
    """A model of the test's own, so that the tests share the peers and nothing else."""
    return canonical.digest(secrets.token_bytes(8))


@pytest.fixture
def hostile(members: Members) -> Iterator[tuple[Key, PeerHost]]:
    """A peer that checks nothing that it stores or reads, and may lie when asked."""
    protocol = members[1][1].dht.protocol
    validator, storage = protocol.record_validator, protocol.storage
    protocol.record_validator = None
    yield members[1]
    protocol.record_validator, protocol.storage = validator, storage


async def test_what_one_peer_publishes_the_others_read(members: Members, model: ModelId) -> None:
    claims = [lease(key, model) for key, _ in members]
    directories = [Directory(host, model) for _, host in members]
    for (key, _), directory, claim in zip(members, directories, claims, strict=True):
        await directory.publish_lease(key.sign("lease", claim))
    here = presence(*members[1], model)
    await directories[1].publish_presence(members[1][0].sign("presence", here))

    for directory in directories:
        assert await directory.leases() == sorted(claims, key=lambda claim: claim.peer)
        assert await directory.presences() == [here]
    assert await Directory(members[2][1], canonical.digest(b"another")).leases() == []
    assert dht_key("lease", model) not in members[3][1].dht.protocol.storage, "a client stores for nobody"


async def test_a_peer_alone_reads_what_it_published_and_renews_it(tmp_path: Path, model: ModelId) -> None:
    async with swarm(tmp_path, 1) as [(key, host)]:
        directory = Directory(host, model)
        assert await directory.leases() == []
        for queue in (1, 2):
            await directory.publish_lease(key.sign("lease", lease(key, model, queue=queue)))
            assert [claim.queue for claim in await directory.leases()] == [queue]


async def test_a_lease_that_is_renewed_replaces_the_old_one(members: Members, model: ModelId) -> None:
    (key, host), (_, reader) = members[:2]
    for queue in (1, 2):
        await Directory(host, model).publish_lease(key.sign("lease", lease(key, model, queue=queue)))
        assert [claim.queue for claim in await Directory(reader, model).leases()] == [queue]


async def test_a_peer_that_leaves_is_gone_at_once(members: Members, model: ModelId) -> None:
    (key, host), (_, other) = members[1:3]
    leaver, reader = Directory(host, model), Directory(other, model)
    staying = lease(key, model)
    await leaver.publish_lease(key.sign("lease", staying))
    assert await reader.leases() == [staying]
    last_word = dataclasses.replace(staying, leaving=True, expires=staying.expires + 0.001)
    await leaver.publish_lease(key.sign("lease", last_word))
    assert await reader.leases() == []


async def test_a_lease_ends_when_it_expires(members: Members, model: ModelId) -> None:
    (key, host), (_, reader) = members[:2]
    brief = lease(key, model, lasts=1.5)
    await Directory(host, model).publish_lease(key.sign("lease", brief))
    assert await Directory(reader, model).leases() == [brief]
    while time.time() < brief.expires:
        await Directory(reader, model).leases()
    assert await Directory(reader, model).leases() == []


async def test_nobody_publishes_what_others_would_refuse(members: Members, model: ModelId) -> None:
    key, host = members[0]
    other = members[1][0]
    for record, reason in (
        (other.sign("lease", lease(other, model)), "owner"),
        (key.sign("lease", lease(key, canonical.digest(b"another"))), "owner"),
        (key.sign("presence", presence(key, host, model)), "owner"),
        (key.sign("lease", lease(key, model, lasts=LEASE_SECONDS + 60)), "expiry"),
    ):
        with pytest.raises(Rejected) as refused:
            await Directory(host, model).publish_lease(record)
        assert refused.value.reason == reason


async def offer(hostile: PeerHost, victim: PeerHost, key: Any, subkey: Any, value: Any, expires: float) -> bool:
    """Stores with the victim as a peer does that follows no rule; whether it took it."""
    protocol = hostile.dht.protocol
    answer = await protocol.call_store(victim.p2p.peer_id, [key], [value], [expires], subkeys=[subkey])
    return bool(answer and answer[0])


async def test_a_hostile_peer_stores_nothing_in_anothers_name(
    members: Members, model: ModelId, hostile: tuple[Key, PeerHost]
) -> None:
    (_, victim), (mallory, host), (bystander, reader), _ = members
    honest = lease(bystander, model)
    await Directory(reader, model).publish_lease(bystander.sign("lease", honest))

    soon, dumps = time.time() + 20, msgpack.packb
    own, long = lease(mallory, model), lease(mallory, model, lasts=LEASE_SECONDS + 60)
    signed = mallory.sign("lease", own)
    forged = mallory.sign("lease", dataclasses.replace(own, peer=bystander.peer, expires=soon + 5))
    leases, elsewhere = dht_key("lease", model), dht_key("lease", canonical.digest(b"another"))
    for key, subkey, value, expires in (
        (leases, None, dumps(signed), own.expires),  # a plain value, without a subkey
        (leases, None, dumps("anything"), soon),
        (leases, bystander.peer, dumps(signed), own.expires),  # somebody else's subkey
        (leases, bystander.peer, dumps(forged), soon + 5),  # somebody else's lease
        (leases, mallory.peer, dumps(signed), own.expires + 5),  # longer than what was signed
        (leases, mallory.peer, dumps(mallory.sign("lease", long)), long.expires),  # longer than any lease
        (dht_key("presence", model), mallory.peer, dumps(signed), own.expires),  # under another key
        (elsewhere, mallory.peer, dumps(signed), own.expires),
        (leases, mallory.peer, signed, own.expires),  # not in the encoding of values
        (leases, mallory.peer, dumps(signed) + b"\0", own.expires),
        (leases, mallory.peer, b"\xc6\xff\xff\xff\xff", soon),
        (leases, 7, dumps(signed), own.expires),
    ):
        assert not await offer(host, victim, key, subkey, value, expires)
    assert await offer(host, victim, leases, mallory.peer, dumps(signed), own.expires), "its own lease is good"
    for someone in (victim, reader):
        assert await Directory(someone, model).leases() == sorted([own, honest], key=lambda claim: claim.peer)


async def test_an_old_lease_sent_again_neither_replaces_nor_ends_the_new_one(
    members: Members, model: ModelId, hostile: tuple[Key, PeerHost]
) -> None:
    alice, host = members[0]
    directory = Directory(host, model)
    old, new = lease(alice, model, lasts=2.0, queue=1), lease(alice, model, queue=2)
    for claim in (old, new):
        await directory.publish_lease(alice.sign("lease", claim))
    record = msgpack.packb(alice.sign("lease", old))
    assert not await offer(hostile[1], host, dht_key("lease", model), alice.peer, record, old.expires)
    while time.time() < old.expires + 0.1:
        assert await directory.leases() == [new]


class Liar(dht.Records):
    """Answers the same to everything."""

    def __init__(self, lie: Any) -> None:
        super().__init__(0)
        self._lie = lie

    def get(self, key: Any) -> Any:
        return self._lie


async def test_a_hostile_peers_answers_hide_and_invent_nothing(
    members: Members, model: ModelId, hostile: tuple[Key, PeerHost]
) -> None:
    """It answers with forged records, with plain values, and with claims to have the newest there can be."""
    (alice, honest), _, (bob, reader), _ = members
    mallory, liar = hostile
    claim, own = lease(alice, model), lease(mallory, model)
    await Directory(honest, model).publish_lease(alice.sign("lease", claim))
    forged = msgpack.packb(mallory.sign("lease", dataclasses.replace(claim, peer=bob.peer)))

    mixed, far = DictionaryDHTValue(), DictionaryDHTValue()
    mixed.store(bob.peer, forged, claim.expires)
    mixed.store(mallory.peer, msgpack.packb(mallory.sign("lease", own)), own.expires)
    far.store("nobody", b"", 1e18)
    for value, until, seen in (
        (forged, 1e18, {alice.peer}),
        (far, float("inf"), {alice.peer}),
        (DictionaryDHTValue(), float("inf"), {alice.peer}),
        (mixed, float("inf"), {alice.peer, mallory.peer}),
    ):
        liar.dht.protocol.storage = Liar(ValueWithExpiration(value, until))
        leases = dht_key("lease", model)
        answer = (await reader.dht.protocol.call_find(liar.p2p.peer_id, [leases]))[leases][0]
        assert answer is None or answer.expiration_time < time.time() + LEASE_SECONDS
        assert {found.peer for found in await Directory(reader, model).leases()} == seen


async def test_a_peer_has_one_place_in_the_dht(members: Members) -> None:
    (_, host), (_, other), *_ = members
    protocol = host.dht.protocol
    await protocol.update_routing_table(DHTID.generate(source="chosen"), other.p2p.peer_id)
    assert DHTID.generate(source="chosen") not in protocol.routing_table
    assert dht.dht_id(other.p2p.peer_id) in protocol.routing_table
    assert isinstance(protocol.record_validator, RecordValidator)


def nested(levels: int) -> bytes:
    raw = b""
    for _ in range(levels):
        raw = msgpack.packb(msgpack.ExtType(0x40, raw))
    return raw


def dictionary(*items: Any) -> bytes:
    return bytes(msgpack.packb(msgpack.ExtType(0x50, msgpack.packb([1, 2.0, list(items)]))))


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(nested(50), id="nested extensions"),
        pytest.param(dictionary([msgpack.ExtType(0x40, b"\x90"), b"", 1.0]), id="an extension for a subkey"),
        pytest.param(dictionary(["peer", b"", "soon"]), id="no time"),
        pytest.param(b"\xc7\x08\x50\x93\x01\x02\xdd\xff\xff\xff\xff", id="a list without end"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="an array"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="a map"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xc1", id="no msgpack"),
    ],
)
async def test_bytes_that_claim_more_than_they_are_do_not_decode(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"|\w"):
        dht.Serializer.loads(raw)


async def test_what_is_stored_for_others_has_a_budget_and_expires(model: ModelId) -> None:
    now, key = time.time(), dht_key("lease", model)
    records = dht.Records(10_000)
    taken = [records.store_subkey(key, f"peer {n}", bytes(1000), now + 60) for n in range(20)]
    assert 0 < sum(taken) < 10
    held = records.get(key)
    assert held is not None
    assert len(held.value) == sum(taken)
    records = dht.Records(10_000)
    assert not records.store_subkey(key, "peer", b"late", now - 1)
    assert records.get(key) is None
    assert not records.store(key, b"without a subkey", now + 60)
