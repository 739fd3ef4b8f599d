"""A node: the parts started in order, kept going, and stopped in the reverse order."""

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from p2pmodel.control.server import ControlServer
from p2pmodel.domain.errors import P2PModelError, UsageError
from p2pmodel.domain.experts import describe
from p2pmodel.domain.ids import VersionId, short
from p2pmodel.domain.swarm import Span
from p2pmodel.gateway.feed import Feed
from p2pmodel.gateway.pages import Pages
from p2pmodel.gateway.server import HttpServer
from p2pmodel.logic.expert_placement import choose_experts
from p2pmodel.logic.placement import choose_span
from p2pmodel.node.attendance import Attendance
from p2pmodel.node.community import Community
from p2pmodel.node.lineages.bases import Part, find_base, open_base
from p2pmodel.node.lineages.contacts import remember_contacts
from p2pmodel.node.lineages.discovery import bootstrap_peers, local_lineage, swarm_lineage
from p2pmodel.node.lineages.heads import first_heads
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.machine.device import DTYPES, SCHEMES, Device, choose_device
from p2pmodel.node.machine.remote_control import remote_control
from p2pmodel.node.machine.threads import in_daemon, use_threads
from p2pmodel.node.service import Service
from p2pmodel.node.watching.gauges import Gauges
from p2pmodel.node.watching.glance import Glance, Glancer
from p2pmodel.node.watching.overview import NodeView
from p2pmodel.node.watching.traffic import Traffic
from p2pmodel.store.home import Home
from p2pmodel.swarm.blobs import BlobServer
from p2pmodel.swarm.directory import Directory
from p2pmodel.swarm.host import PeerHost
from p2pmodel.swarm.sync import SyncServer
from p2pmodel.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from p2pmodel.node.hosting.expert_hosting import ExpertHosting
    from p2pmodel.node.hosting.hosting import Hosting
    from p2pmodel.node.hosting.trunk import Trunk
    from p2pmodel.node.moving.experts import ExpertMover
    from p2pmodel.node.moving.layers import LayerMover
    from p2pmodel.node.rounds.maintaining import Maintainer

log = logging.getLogger(__name__)

GAUGE_SECONDS = 2.0
GLANCE_SECONDS = 1.0


@dataclass(frozen=True)
class NodeOptions:
    home: Path | None = None
    model: str | None = None
    peers: tuple[str, ...] = ()
    swarm_key: Path | None = None
    layers: Span | str = "auto"
    capacity: int | None = None
    experts: tuple[int, ...] | str | None = None
    """Those to host, without the rest of their layers, or `auto`; none for the layers without their experts."""
    spread_missing: bool = False
    expert_codec: str | None = None
    base: Path | None = None
    gpu: int | None = None
    dtype: str | None = None
    cache_memory: int | None = None
    host: str = "127.0.0.1"
    port: int = 0
    http: tuple[str, int] | None = None
    control_listen: tuple[str, int] | None = None
    control_tls: Path | None = None
    maintain: bool = False
    ask: bool = False
    threads: int | None = None


async def run(options: NodeOptions, say: Callable[[str], None], show: Callable[[Glance], None] | None = None) -> None:
    """Runs a node until SIGINT or SIGTERM; `say` is told what a person wants to know, and `show` what there is to see,
    every second once it serves. Raises P2PModelError."""
    began = time.monotonic()
    _check_experts(options)
    device = choose_device(options.gpu, options.dtype, options.cache_memory)
    use_threads(options.threads)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    async with AsyncExitStack() as stack:
        starting = asyncio.ensure_future(_start(options, device, stack, stopping, say))
        stopped = asyncio.ensure_future(stopping.wait())
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
            return
        node = starting.result()
        say(f"{node.serving} (ready after {time.monotonic() - began:.1f} s)")
        failing = asyncio.ensure_future(node.run(show))
        await asyncio.wait({failing, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            failing.result()
        failing.cancel()
        await asyncio.wait({failing})
        say("leaving")


@dataclass
class Node:
    """What has been started; the stack stops it."""

    community: Community
    attendance: Attendance
    gauges: Gauges
    host: PeerHost
    mover: "LayerMover | ExpertMover | None"
    trunk: "Trunk | None"
    glancer: Glancer
    serving: str

    async def run(self, show: Callable[[Glance], None] | None = None) -> None:
        async with asyncio.TaskGroup() as tasks:
            if show:
                tasks.create_task(self._show(show))
            if self.mover:
                tasks.create_task(self.mover.run())
            if self.trunk:
                tasks.create_task(self.trunk.run(self.attendance.renew))
            tasks.create_task(self.community.run())
            tasks.create_task(self.attendance.run())
            tasks.create_task(self._measure())
            tasks.create_task(self._watch_daemon())

    async def _measure(self) -> None:
        while True:
            await self.gauges.refresh()
            await asyncio.sleep(GAUGE_SECONDS)

    async def _show(self, show: Callable[[Glance], None]) -> None:
        while True:
            show(self.glancer.take())
            await asyncio.sleep(GLANCE_SECONDS)

    async def _watch_daemon(self) -> None:
        status = await self.host.ended()
        raise P2PModelError(
            f"The P2P daemon of this node ended with status {status}.", "Start the node again: p2pmodel join"
        )


async def _start(
    options: NodeOptions, device: Device, stack: AsyncExitStack, stopping: asyncio.Event, say: Callable[[str], None]
) -> Node:
    remote = remote_control(options.control_listen, options.control_tls)
    home = Home.open(options.home)
    stack.callback(home.lock().release)
    key, swarm_key = home.key, home.swarm_key(options.swarm_key)
    metrics = Metrics()
    feed = Feed()
    if options.http is not None:
        server = await HttpServer.start(*options.http, Pages(feed, metrics.exposition, chat=False).routes())
        stack.push_async_callback(server.stop)
        say(f"status at {server.url}/, metrics at {server.url}/metrics")
    local = None if options.peers else await in_daemon(local_lineage, home, options.model, say)
    host = await PeerHost.start(
        home.key_path, listen=[f"/ip4/{options.host}/tcp/{options.port}"], bootstrap=options.peers, swarm_key=swarm_key
    )
    stack.push_async_callback(host.stop)
    contacts = bootstrap_peers(options.peers)
    lineage = local or await swarm_lineage(home, host, contacts, options.model)
    say(f"peer {key.peer}")
    say(f"model {lineage.manifest.name} {lineage.number(lineage.head)}, id {lineage.model}")

    directory = Directory(host, lineage.model)
    community = Community(
        host,
        home,
        lineage,
        directory,
        metrics,
        listen=f"/ip4/{options.host}/tcp/{options.port + 1 if options.port else 0}",
        swarm_key=swarm_key,
    )
    stack.push_async_callback(community.stop)
    blobs = BlobServer(host, home.objects)
    sync = SyncServer(
        host, lambda model: lineage.inventory() if model == lineage.model else (), lambda: [lineage.offer()]
    )
    for service in (blobs, sync):
        await service.start()
        stack.push_async_callback(service.stop)
    await community.start(contacts)
    _note_head(home, lineage)
    base = await in_daemon(_base, home, lineage, options, say)
    maintainer = await _maintainer(lineage, base, home, community, metrics) if base and options.maintain else None
    if maintainer:
        stack.callback(maintainer.stop)
    hosts = base if options.layers != "none" else None
    trunk = _trunk(options, device, host, lineage, directory, say) if hosts and options.experts == () else None
    experts = (
        await _experts(options, device, host, lineage, directory, hosts, say) if hosts and options.experts else None
    )
    hosting = (
        await _hosting(options, device, host, lineage, directory, hosts, trunk, say) if hosts and not experts else None
    )
    for part in (trunk, experts, hosting):
        if part:
            stack.push_async_callback(part.stop)

    async def adopted(version: VersionId) -> None:
        for part in (experts, hosting):
            if part:
                await asyncio.to_thread(part.adopt, version)
        lineage.note_served(version)
        say(f"adopted {lineage.manifest.name} {lineage.number(version)} ({short(version)})")
        await attendance.renew()

    community.keep_rounds(key, maintainer, adopted, options.ask)
    attendance = Attendance(
        key, host, lineage, directory, community, hosting, _roles(options, hosting, experts), experts, trunk
    )
    await attendance.renew()
    stack.push_async_callback(attendance.leave)
    traffic = Traffic(blobs, community.exchange, hosting, experts, trunk)
    control = ControlServer(
        home.control_socket,
        Service(
            home, host, lineage, directory, community, attendance, hosting, traffic, options.maintain, stopping.set
        ),
        remote,
    )
    await control.start()
    if remote:
        say(f"control API at {remote.host}:{control.port}, for clients with a certificate")
    stack.push_async_callback(control.stop)
    for address in host.addresses:
        say(f"to join this swarm: p2pmodel join --peers {address}")
    if swarm_key:
        say(f"private: only with the swarm key {swarm_key.fingerprint}")
    remember_contacts(home, host.addresses)
    feed.begin(NodeView(host, lineage, directory, community, hosting).status)
    gauges = Gauges(metrics, host, lineage, attendance, community, hosting, traffic)
    mover = (
        _mover(options, lineage, host, attendance, hosting, say)
        if hosting
        else _expert_mover(options, lineage, directory, attendance, experts, say)
    )
    glancer = Glancer(host, lineage, attendance, community, hosting, experts)
    serving = _serving(lineage, hosting, experts, options)
    return Node(community, attendance, gauges, host, mover, trunk, glancer, serving)


def _note_head(home: Home, lineage: Lineage) -> None:
    """What came while the node was away is served from the start."""
    result = lineage.result(lineage.head)
    if result is None or home.objects.has(result.digest):
        lineage.note_served(lineage.head)


def _base(home: Home, lineage: Lineage, options: NodeOptions, say: Callable[[str], None]) -> Path | None:
    """The folder of the base checkpoint, when what the node does needs it."""
    if options.layers == "none" and not options.maintain:
        return None
    return find_base(home, lineage, options.base, say, Part.WHOLE if options.maintain else Part.OUTLINE)


async def _maintainer(lineage: Lineage, base: Path, home: Home, community: Community, metrics: Metrics) -> "Maintainer":
    from p2pmodel.node.rounds.maintaining import Maintainer  # loads transformers, as hosting does

    if home.key.peer not in lineage.manifest.maintainers:
        raise UsageError(
            f"{home.key.peer} is no maintainer of {lineage.manifest.name}.",
            "Leave --maintain out, or use the home of a maintainer's key.",
        )
    if not home.objects.has(lineage.manifest.exam.digest):
        await community.fetch(lineage.manifest.exam)

    def refused(reason: str) -> None:
        metrics.refused.labels("candidate", reason).inc()

    return await asyncio.to_thread(Maintainer, lineage, home.key.peer, base, metrics.merge_seconds.observe, refused)


async def _hosting(
    options: NodeOptions,
    device: Device,
    host: PeerHost,
    lineage: Lineage,
    directory: Directory,
    base: Path,
    trunk: "Trunk | None",
    say: Callable[[str], None],
) -> "Hosting":
    from p2pmodel.node.hosting.hosting import Hosting

    span = await _span(options, lineage, directory, host, say)
    checkpoint = await asyncio.to_thread(open_base, lineage, base, say)
    if trunk is None:
        await in_daemon(checkpoint.provide, checkpoint.weight_files(span))
        return await Hosting.start(host, lineage, checkpoint, span, device)
    from p2pmodel.engine.expert_layout import fetch_part

    await in_daemon(fetch_part, checkpoint, span, ())
    hosting = await Hosting.start(host, lineage, checkpoint, span, device, trunk.dispatcher)
    trunk.begin(hosting.expert_counts)
    return hosting


async def _experts(
    options: NodeOptions,
    device: Device,
    host: PeerHost,
    lineage: Lineage,
    directory: Directory,
    base: Path,
    say: Callable[[str], None],
) -> "ExpertHosting":
    from p2pmodel.engine.expert_layout import ExpertLayout
    from p2pmodel.node.hosting.expert_hosting import ExpertHosting

    span = _all_layers(options, lineage.manifest.layers)
    checkpoint = await asyncio.to_thread(open_base, lineage, base, say)
    if isinstance(options.experts, tuple):
        chosen, why = options.experts, ", as asked"
    else:
        counts = await asyncio.to_thread(lambda: ExpertLayout(checkpoint).counts_in(span))
        count = min(counts.values())
        leases = [lease for lease in await directory.expert_leases() if lease.peer != host.peer]
        capacity = options.capacity or max(1, count // 2)
        heads = first_heads(lineage)
        chosen, why = choose_experts(leases, tuple(counts), count, capacity, salt=host.peer, heads=heads)
        why = f": {why}"
    say(f"experts {describe(chosen)} of layers {span}{why}")
    return await ExpertHosting.start(host, lineage, checkpoint, span, chosen, device)


def _trunk(
    options: NodeOptions,
    device: Device,
    host: PeerHost,
    lineage: Lineage,
    directory: Directory,
    say: Callable[[str], None],
) -> "Trunk":
    """Rows travel in the precision that they are computed in, unless another codec was asked for."""
    from p2pmodel.node.hosting.trunk import Trunk  # loads torch, as hosting does

    codec = options.expert_codec or device.wide
    return Trunk(host, lineage, directory, codec, spread=options.spread_missing, say=say)


def _check_experts(options: NodeOptions) -> None:
    """Raises UsageError."""
    if options.experts and options.dtype in SCHEMES:
        raise UsageError(
            f"Experts that are hosted apart from their layers can't be held in {options.dtype}.",
            f"Use one of {', '.join(DTYPES)}, or host whole layers: leave --experts out.",
        )


def _all_layers(options: NodeOptions, layers: int) -> Span:
    """Where only experts are left out, or taken, all layers are the default. Raises UsageError."""
    span = options.layers if isinstance(options.layers, Span) else Span(0, layers)
    if span.end > layers:
        raise UsageError(f"There are no layers {span}: the model has {layers}.", f"Use at most --layers 0:{layers}.")
    return span


async def _span(
    options: NodeOptions, lineage: Lineage, directory: Directory, host: PeerHost, say: Callable[[str], None]
) -> Span:
    layers = lineage.manifest.layers
    if isinstance(options.layers, Span) or options.experts is not None:
        span = _all_layers(options, layers)
        say(f"layers {span} of {layers}{', as asked' if span == options.layers else ', without their experts'}")
        return span
    leases = [lease for lease in await directory.leases() if lease.peer != host.peer]
    leases = first_heads(lineage).hosts(leases, host.peer)
    span, reason = choose_span(leases, layers, _capacity(options, layers), salt=host.peer)
    say(f"layers {span} of {layers}: {reason}")
    return span


def _capacity(options: NodeOptions, layers: int) -> int:
    """A node that begins a swarm alone holds the whole model, so that there is something to join."""
    return options.capacity or (max(1, layers // 2) if options.peers else layers)


def _mover(
    options: NodeOptions,
    lineage: Lineage,
    host: PeerHost,
    attendance: Attendance,
    hosting: "Hosting",
    say: Callable[[str], None],
) -> "LayerMover | None":
    """None for a node whose layers were asked for: they stay."""
    from p2pmodel.node.moving.layers import LayerMover  # loads torch, as hosting does

    if isinstance(options.layers, Span) or options.experts is not None:
        return None
    capacity = _capacity(options, lineage.manifest.layers)
    return LayerMover(host.peer, lineage, attendance, hosting, capacity, say)


def _expert_mover(
    options: NodeOptions,
    lineage: Lineage,
    directory: Directory,
    attendance: Attendance,
    experts: "ExpertHosting | None",
    say: Callable[[str], None],
) -> "ExpertMover | None":
    """None for a node whose experts were asked for: they stay."""
    if experts is None or options.experts != "auto":
        return None
    from p2pmodel.node.moving.experts import ExpertMover  # loads torch, as hosting does

    return ExpertMover(directory, lineage, experts, attendance.renew, say)


def _roles(options: NodeOptions, hosting: "Hosting | None", experts: "ExpertHosting | None") -> tuple[str, ...]:
    roles = (("host", hosting), ("experts", experts), ("maintainer", options.maintain))
    return tuple(role for role, has in roles if has) or ("peer",)


def _serving(lineage: Lineage, hosting: "Hosting | None", experts: "ExpertHosting | None", options: NodeOptions) -> str:
    what = "records and patches, no layers"
    if hosting:
        without = ", without their experts," if options.experts is not None else ""
        what = f"layers {hosting.span}{without} on {hosting.device.name} in {hosting.device.dtype}"
    elif experts:
        what = f"experts {describe(experts.experts)} of layers {experts.span} on {experts.device.name}"
        what += f" in {experts.device.dtype}"
    return f"serving {what} of {lineage.manifest.name} {lineage.number(lineage.head)}" + (
        ", as a maintainer" if options.maintain else ""
    )
