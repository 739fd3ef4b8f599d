"""How a trunk keeps connected to hosts of its experts that end, or say nothing. It hosts all experts itself too, so two
daemons are enough."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p2pmodel.domain.errors import PeerFailed
from p2pmodel.domain.experts import ExpertLease
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.swarm import Presence, Span
from p2pmodel.engine.checkpoint import read_checkpoint
from p2pmodel.engine.experts import load_experts
from p2pmodel.engine.shard_runner import HostedExperts, ShardRunner
from p2pmodel.engine.versions import VersionTable
from p2pmodel.node.hosting import trunk as trunks
from p2pmodel.node.hosting.trunk import Trunk
from p2pmodel.swarm import expert_link
from p2pmodel.swarm.expert_link import ExpertLink
from p2pmodel.swarm.expert_server import ExpertServer
from p2pmodel.swarm.expert_streams import EXPERTS
from p2pmodel.swarm.host import PeerHost
from p2pmodel.swarm.streams import Listener
from p2pmodel.wire import canonical
from tests.support.experts import EXPERTS as MANY
from tests.support.experts import save_experts
from tests.support.swarm import presence, swarm
from tests.support.waiting import soon

MODEL = canonical.digest(b"model")


@dataclass
class Setting:
    """The trunk's host serves all experts; `silent` accepts streams and says nothing. told: whether all experts were
    served, each time that the trunk said it had changed; also the directory of both."""

    host: PeerHost
    silent: PeerHost
    server: ExpertServer
    leases: list[ExpertLease]
    presences_now: list[Presence]
    told: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        lineage: Any = SimpleNamespace(model=MODEL, served_head=MODEL)
        directory: Any = self
        self.trunk = Trunk(self.host, lineage, directory, "fp32", spread=False, say=lambda _: None)
        self.trunk.begin({0: MANY, 1: MANY})

    async def expert_leases(self) -> list[ExpertLease]:
        return self.leases

    async def presences(self) -> list[Presence]:
        return self.presences_now

    async def changed(self) -> None:
        self.told.append(self.trunk.serves(MODEL))

    @property
    def link(self) -> ExpertLink | None:
        helper = self.trunk.dispatcher.helpers.get(PeerId(self.host.peer))
        return helper.link if helper else None

    async def linked(self) -> ExpertLink:
        return await soon(lambda: self.link)

    async def end_stream(self) -> None:
        """As the host does with one that is idle."""
        await soon(lambda: self.server.stats.trunks)
        for stream in list(self.server._members):
            self.server._call(partial(self.server._end, stream, PeerFailed("It closed a stream that was idle.")))


@pytest.fixture
async def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Setting]:
    monkeypatch.setattr(trunks, "LOOK_SECONDS", 0.05)
    for module, name in ((trunks, "SUSPECT_SECONDS"), (expert_link, "HANDSHAKE_SECONDS")):
        monkeypatch.setattr(module, name, 600.0)  # longer than any test here takes
    save_experts("qwen3_moe", tmp_path / "model")
    checkpoint = read_checkpoint(tmp_path / "model")
    everything = Span(0, checkpoint.layers)
    shard = load_experts(checkpoint, everything, range(MANY))
    table = VersionTable(shard)
    table.put(MODEL, {})
    async with swarm(tmp_path, 2) as members:
        (_, host), (_, silent) = members
        server = ExpertServer(host, ShardRunner(HostedExperts(shard, table), MODEL))
        await asyncio.to_thread(server.start)
        listener = Listener(silent, EXPERTS)
        leases = [
            ExpertLease(peer.peer, MODEL, everything, tuple(range(MANY)), "fp32", (MODEL,), 1e-5, 0, False, 1e12)
            for _, peer in members
        ]
        found = Setting(host, silent, server, leases, [presence(key, peer, MODEL) for key, peer in members])
        running = asyncio.create_task(found.trunk.run(found.changed))
        yield found
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await found.trunk.stop()
        listener.close()
        await asyncio.to_thread(server.stop)


async def test_who_says_nothing_keeps_the_trunk_from_no_other(setting: Setting) -> None:
    """Nor from hearing that one of them has ended."""
    link = await setting.linked()
    await soon(lambda: setting.told == [True])
    assert setting.silent.peer in setting.trunk._dialling
    await setting.end_stream()
    await soon(lambda: setting.told == [True, False])
    assert link.stream.fileno() == -1
    assert setting.silent.peer in setting.trunk._dialling
    assert setting.host.peer in setting.trunk._failed_at  # it has ended what it had only just opened


async def test_a_link_that_ended_while_it_was_idle_is_there_again_at_once(setting: Setting) -> None:
    link = await setting.linked()
    link.opened -= trunks.SUSPECT_SECONDS
    await setting.end_stream()
    await soon(lambda: setting.link not in (None, link))
    assert setting.host.peer not in setting.trunk._failed_at
    assert setting.trunk.serves(MODEL)


async def test_a_link_that_is_long_idle_is_replaced_before_its_host_ends_it(setting: Setting) -> None:
    link = await setting.linked()
    await soon(lambda: setting.told == [True])
    link._used -= trunks.RENEW_SECONDS
    await soon(lambda: setting.link is not link)
    assert setting.told == [True]
    assert link.stream.fileno() == -1
    await soon(lambda: setting.server.stats.trunks == 1)
