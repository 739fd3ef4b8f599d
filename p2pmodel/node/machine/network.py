"""What `p2pmodel doctor` finds out about peers, and about how others reach a node of this home."""

import asyncio
import ipaddress
import re
import time
from collections.abc import Sequence

from p2pmodel.domain.errors import P2PModelError
from p2pmodel.domain.ids import PeerId, short
from p2pmodel.domain.swarm import CLAIM_SECONDS, LEASE_SECONDS
from p2pmodel.node.machine.checkup import Finding
from p2pmodel.swarm.addresses import parse_peer_address
from p2pmodel.swarm.host import PeerHost
from p2pmodel.swarm.ping import probe
from p2pmodel.swarm.sync import lineages
from p2pmodel.wire.swarm_key import SwarmKey
from p2pmodel.wire.v1 import control_pb2 as pb

SKEW_SECONDS = 5.0
"""From where a difference between clocks is worth an alert, too (docs/runbooks/clock-skew.md)."""
PING_SECONDS = 5.0


async def examine_peers(addresses: Sequence[str], swarm_key: SwarmKey | None = None) -> list[Finding]:
    """Each is dialled from here, as `p2pmodel join --peers` would, by a peer of its own that serves nothing. Raises
    UsageError for an address that is none."""
    wanted = [(parse_peer_address(address)[0], address) for address in addresses]
    host = await PeerHost.start(None, client_only=True, swarm_key=swarm_key)
    try:
        found = await asyncio.gather(*(_examine(host, peer, address) for peer, address in wanted))
    finally:
        await host.stop()
    return [finding for findings in found for finding in findings]


async def _examine(host: PeerHost, peer: PeerId, address: str) -> list[Finding]:
    name, began = f"peer …{peer[-8:]}", time.monotonic()
    try:
        await host.connect(peer, [address])
    except P2PModelError as error:
        advice = "is it running, is the port open in its firewall and forwarded by its router? See docs/operating.md"
        reason = error.message.splitlines()[-1].strip("* ").removesuffix(".")
        return [Finding("peers", "bad", f"{name} can't be reached: {reason}", advice)]
    took = time.monotonic() - began
    findings = [Finding("peers", "ok", f"{name} can be reached from here ({took:.2f} s to connect)")]
    try:
        offers = await lineages(host, peer)
        have = ", ".join(f"{offer.name} ({short(offer.model)})" for offer in offers) or "no model"
        findings.append(Finding("peers", "ok", f"{name} has {have}"))
    except P2PModelError as error:
        findings.append(Finding("peers", "note", f"{name} does not say what it has: {error.message}"))
    return [*findings, await _compare_clocks(host, peer, name)]


async def _compare_clocks(host: PeerHost, peer: PeerId, name: str) -> Finding:
    try:
        pong = await asyncio.to_thread(probe, host, peer, PING_SECONDS)
    except P2PModelError:
        return Finding("clock", "note", f"{name} hosts no layers, so it does not tell the time", "name a host instead")
    offset, trip = pong.clock_offset, f"round trip {pong.seconds * 1e3:.1f} ms"
    text = f"the clock of {name} is {abs(offset):.2f} s {'ahead of' if offset >= 0 else 'behind'} this one's ({trip})"
    if abs(offset) < SKEW_SECONDS:
        return Finding("clock", "ok", text)
    advice = "one of the two is wrong: `timedatectl` on both; "
    advice += f"leases hold for {CLAIM_SECONDS:.0f} s by the reader's clock"
    return Finding("clock", "bad" if abs(offset) >= LEASE_SECONDS else "note", text, advice)


def examine_node(reply: pb.StatusReply) -> list[Finding]:
    """Of the node that runs on this home: what it says of itself, and who can reach it."""
    served = [f"layers {m.hosted.start}:{m.hosted.end} of {m.name}" for m in reply.models if m.HasField("hosted")]
    doing = ", ".join(served) or "no layers"
    findings = [Finding("node", "ok", f"a node runs on this home (process {reply.pid}) and serves {doing}")]
    return [*findings, reachability(reply.addresses)]


def reachability(addresses: Sequence[str]) -> Finding:
    """Who can reach a node with these multiaddrs, as far as these tell: a firewall or a router may still be between.
    No peer is asked to dial back, so the test is to dial from outside."""
    places = {ipaddress.ip_address(found[1]): a for a in addresses if (found := re.match(r"/ip[46]/([^/]+)/", a))}
    widest = next((ip for ip in places if ip.is_global), None) or next((i for i in places if not i.is_loopback), None)
    if widest is None:
        return Finding(
            "node",
            "note",
            "the node can be reached from this machine only",
            "to let others in: p2pmodel join --host 0.0.0.0 --port 7000",
        )
    test = f"to be sure, on another machine: p2pmodel doctor --peers {places[widest]}"
    if widest.is_global:
        return Finding("node", "ok", f"the node announces {widest}, an address of the internet", test)
    what = f"the node announces {widest}, an address of the local network"
    return Finding("node", "note", what, f"others need its ports forwarded by the router (docs/operating.md); {test}")
