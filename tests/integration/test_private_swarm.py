"""A private swarm of real nodes: what members can do, and what strangers, with no key or with another one, cannot."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from p2pmodel import starter
from p2pmodel.cli.app import app
from p2pmodel.cli.localswarm import LocalSwarm, NodeProcess
from p2pmodel.domain.errors import PeerFailed, Rejected, Unreachable
from p2pmodel.domain.ids import ModelId, PeerId
from p2pmodel.domain.model import BlobRef
from p2pmodel.gossip.link import GossipLink
from p2pmodel.node.asking.client import Sampling, SwarmClient
from p2pmodel.store.home import Home
from p2pmodel.store.secrets import write_secret
from p2pmodel.swarm import sync
from p2pmodel.swarm.blobs import BlobFetcher
from p2pmodel.swarm.directory import Directory
from p2pmodel.swarm.host import PeerHost
from p2pmodel.swarm.opening import CHAIN
from p2pmodel.swarm.ping import PING, PingResponder, State, probe
from p2pmodel.swarm.streams import open_stream
from p2pmodel.swarm.validator import dht_key
from p2pmodel.wire.signing import Key
from p2pmodel.wire.swarm_key import SwarmKey
from p2pmodel.wire.v1 import control_pb2 as pb
from p2pmodel.wire.v1 import control_pb2_grpc as rpc
from tests.support.swarm import lease
from tests.support.waiting import soon

pytestmark = pytest.mark.timeout(240)
STRANGERS = ("no key", "another key")


@dataclass
class Private:
    folder: Path
    key: Path
    nodes: tuple[NodeProcess, NodeProcess]
    model: ModelId
    peer: PeerId
    manifest: BlobRef
    """Something that the nodes hold: any member may fetch it."""

    def key_of(self, who: str) -> SwarmKey | None:
        return {"member": SwarmKey.from_text(self.key.read_bytes(), "key"), "another key": SwarmKey(bytes(32))}.get(who)

    @contextlib.asynccontextmanager
    async def host(self, who: str) -> AsyncIterator[PeerHost]:
        """A peer with an open connection to the nodes: p2pd lets everybody in."""
        host = await PeerHost.start(None, swarm_key=self.key_of(who))
        try:
            for node in self.nodes:
                peer = PeerId(node.address.rpartition("/p2p/")[2])
                await host.connect(peer, [node.address])
            yield host
        finally:
            await host.stop()


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Private]:
    folder = tmp_path_factory.mktemp("private")
    key = folder / "swarm.key"
    write_secret(key, SwarmKey.generate().to_text())
    with LocalSwarm(folder) as swarm:
        common = ("--threads", "1", "--swarm-key", str(key))
        made = CliRunner().invoke(app, ["control", "certificates", str(folder / "tls")])
        assert made.exit_code == 0, made.output
        remote = ("--control-listen", "127.0.0.1:0", "--control-tls", str(folder / "tls"))
        first = swarm.start("first", "--layers", "0:3", *common, *remote)
        swarm.wait_until_serving()
        second = swarm.start("second", "--layers", "3:6", *common, "--peers", first.address)
        swarm.wait_until_serving()
        with first.control() as control:
            status = control.status()
        assert any(line.startswith("private: ") for line in first.lines)
        model = ModelId(status.models[0].id)  # type: ignore[arg-type]
        size = Home.open(first.home).objects.size(model)
        assert size
        yield Private(folder, key, (first, second), model, PeerId(status.peer), BlobRef(model, size))


def ask(private: Private, home: Path, key: Path | None) -> str:
    with SwarmClient.connect(home, (private.nodes[0].address,), None, starter.MODEL, key) as client:
        return client.generate("def ", Sampling(3), "head", "fp32", lambda piece: None).text


def test_members_get_answers_and_strangers_do_not_even_join(private: Private, tmp_path: Path) -> None:
    assert ask(private, tmp_path / "member", private.key)
    write_secret(tmp_path / "other.key", SwarmKey(bytes(32)).to_text())
    for key in (None, tmp_path / "other.key"):
        with pytest.raises(Unreachable, match="--swarm-key"):
            ask(private, tmp_path / "stranger", key)


def test_another_machine_can_ask_a_node_by_its_certificate(private: Private) -> None:
    line = next(line for line in private.nodes[0].lines if line.startswith("control API at "))
    tls = private.folder / "tls"
    keys = [(tls / name).read_bytes() for name in ("ca.pem", "client.key", "client.pem")]
    with grpc.secure_channel(line.split()[3].rstrip(","), grpc.ssl_channel_credentials(*keys)) as channel:
        control = rpc.ControlStub(channel)
        assert control.Status(pb.StatusRequest(), timeout=10).peer == private.peer
        assert next(iter(control.Watch(pb.WatchRequest(), timeout=10))).peer == private.peer
        versions = control.ListVersions(pb.ListVersionsRequest(), timeout=10)
        patches = control.ListPatches(pb.ListPatchesRequest(), timeout=10)
    assert versions.model == patches.model == private.model


async def test_a_member_can_list_store_fetch_ask_and_call(private: Private, tmp_path: Path) -> None:
    async with private.host("member") as host:
        await host.join([private.nodes[0].address])
        directory = Directory(host, private.model)
        assert {lease.peer for lease in await directory.leases()} == {
            PeerId(node.address.rpartition("/p2p/")[2]) for node in private.nodes
        }
        objects = Home.open(tmp_path / "home").objects
        await BlobFetcher(host, objects.sink).fetch(private.manifest, [private.peer])
        assert objects.has(private.model)
        assert [offer.model for offer in await sync.lineages(host, private.peer)] == [private.model]
        assert (await asyncio.to_thread(probe, host, private.peer)).sessions == 0
        stream = await asyncio.to_thread(open_stream, host, private.peer, CHAIN)
        stream.close()
        responder = PingResponder(host, lambda session: State(0.0, 7))
        responder.start()
        assert (await asyncio.to_thread(probe, host, PeerId(host.peer))).sessions == 7, "it is a member of its own"
        await asyncio.to_thread(responder.stop)


@pytest.mark.parametrize("who", STRANGERS)
async def test_a_stranger_gets_nowhere(private: Private, tmp_path: Path, who: str) -> None:
    async with private.host(who) as host:
        assert private.peer in await host.peers(), "the connection itself stands"
        with pytest.raises(Unreachable):
            await host.join([private.nodes[0].address])
        assert await Directory(host, private.model).leases() == []
        node, key = host.dht.protocol, dht_key("lease", private.model)
        called = next(i.peer_id for i in await host.p2p.list_peers() if i.peer_id.to_base58() == private.peer)
        assert await node.call_find(called, [key]) is None
        stranger = Key.generate()
        claim = lease(stranger, private.model)
        record = stranger.sign("lease", claim)
        assert await node.call_store(called, [key], [record], [claim.expires], subkeys=[claim.peer]) is None

        with pytest.raises((PeerFailed, Unreachable, Rejected)):
            await BlobFetcher(host, Home.open(tmp_path / "home").objects.sink).fetch(private.manifest, [private.peer])
        with pytest.raises((PeerFailed, Rejected)):
            await sync.lineages(host, private.peer)
        with pytest.raises((PeerFailed, Rejected)):
            await sync.missing(host, private.peer, private.model, ())
        with pytest.raises(PeerFailed):
            await asyncio.to_thread(probe, host, private.peer)
        assert await asyncio.to_thread(said_to, host, private.peer, CHAIN, b"\0" * 4096) == b""

    with private.nodes[0].control() as control:
        status = control.status().models[0]
    assert status.sessions == 0
    assert claim.peer not in {x.peer for x in status.leases}


def said_to(host: PeerHost, peer: PeerId, protocol: str, raw: bytes) -> bytes:
    """What the peer answers to bytes that begin with no pass. Empty when it just hangs up."""
    try:
        with open_stream(host, peer, protocol, 5.0) as stream:
            stream.settimeout(8.0)
            stream.sendall(raw)
            return stream.recv(1)
    except (PeerFailed, ConnectionError):
        return b""


async def test_silent_strangers_keep_no_member_out(private: Private) -> None:
    async with private.host("no key") as stranger, private.host("member") as member:
        silent: list[socket.socket] = []
        try:
            for _ in range(40):
                silent.append(await asyncio.to_thread(open_stream, stranger, private.peer, PING))
            began = time.monotonic()
            await asyncio.to_thread(probe, member, private.peer, 4.0)
            assert time.monotonic() - began < 4.0
        finally:
            for stream in silent:
                stream.close()


async def test_gossip_is_among_members(private: Private) -> None:
    async with private.host("member") as host:
        await host.join([private.nodes[0].address])
        presences = await Directory(host, private.model).presences()
    addresses = [address for presence in presences for address in presence.gossip_addresses]
    assert addresses
    links = {}
    for who in ("member", *STRANGERS):
        key = private.key_of(who)
        links[who] = GossipLink(Key.generate(), lambda raw: None, psk=key.gossip_psk() if key else b"")
    try:
        await asyncio.gather(*(link.start([private.model]) for link in links.values()))
        for link in links.values():
            await link.connect(addresses)
        await soon(lambda: links["member"].stats().peers)
        before = {who: link.stats().peers for who, link in links.items()}
    finally:
        await asyncio.gather(*(link.stop() for link in links.values()))
    assert before["no key"] == before["another key"] == 0
    for node in private.nodes:
        assert "gossip process has ended" not in node.log.read_text(), "strangers cannot end it either"
