"""What `p2pmodel doctor` looks at on this machine; `machine.network` looks at peers."""

import ctypes
import os
import resource
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from p2pmodel.domain.errors import P2PModelError
from p2pmodel.node.machine.device import Device, free_bytes
from p2pmodel.store.home import Home

PACKAGES = ("torch", "transformers", "hivemind", "libp2p", "grpcio", "safetensors")
LITTLE_DISK = 1 << 30
LITTLE_MEMORY = 1 << 30
FEW_DESCRIPTORS = 4096
"""A session takes two on each of its stages, a peer some more."""

_TIME_ERROR = 5
"""Of adjtimex(2): the clock is not synchronised."""
_TIMEX_BYTES = 512
"""More than any `struct timex` has; all zeros only ask."""


@dataclass(frozen=True)
class Finding:
    """level: `bad` keeps p2pmodel from working, a `note` is worth knowing; advice: what to do about it."""

    topic: str
    level: Literal["ok", "note", "bad"]
    what: str
    advice: str = ""


def examine_machine(
    home: Path | None, host: str, port: int, node_runs: bool, swarm_key: Path | None = None
) -> Iterator[Finding]:
    """host, port: what `p2pmodel join` would listen on; the ports are the node's own where `node_runs`. swarm_key: as
    `Home.swarm_key` takes it."""
    yield _python()
    yield from _packages()
    yield _gpu()
    yield _daemon()
    yield from _home(home, swarm_key)
    yield _memory()
    yield _descriptors()
    yield _clock()
    if not node_runs:
        yield from check_ports(host, port)


def _python() -> Finding:
    text = f"Python {sys.version.split()[0]}"
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Finding("software", "ok", text)
    return Finding("software", "bad", text, "use Python 3.11 or 3.12")


def _packages() -> Iterator[Finding]:
    """Those that matter most, and all others that are missing or not of a version that p2pmodel works with."""
    try:
        wanted = [Requirement(text) for text in requires("p2pmodel") or ()]
    except PackageNotFoundError:
        wanted = []
    needed = {each.name: each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})}
    for name in dict.fromkeys((*PACKAGES, *needed)):
        range = str(needed[name].specifier) if name in needed else ""
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding("software", "bad", f"{name} is not installed", f"pip install '{name}{range}'")
            continue
        if name in needed and not needed[name].specifier.contains(found, prereleases=True):
            yield Finding(
                "software", "bad", f"{name} {found} is not what p2pmodel needs", f"pip install '{name}{range}'"
            )
        elif name in PACKAGES:
            yield Finding("software", "ok", f"{name} {found}")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(
            "gpu",
            "note",
            f"no GPU that this PyTorch can use; {torch.get_num_threads()} CPU threads",
            "p2pmodel runs on the CPU; for an NVIDIA GPU install a CUDA build of PyTorch (README)",
        )
    count = torch.cuda.device_count()
    names = ", ".join(
        f"{i}: {torch.cuda.get_device_name(i)}, {free_bytes(Device(f'cuda:{i}')) / 1e9:.1f} GB free"
        for i in range(count)
    )
    return Finding("gpu", "ok", f"GPU {names}")


def _daemon() -> Finding:
    from importlib.resources import files

    daemon = Path(str(files("hivemind") / "hivemind_cli" / "p2pd"))
    if os.access(daemon, os.X_OK):
        return Finding("software", "ok", "the P2P daemon is there")
    return Finding(
        "software",
        "bad",
        "hivemind's P2P daemon is missing or can't be executed",
        "install hivemind again from its wheel, on a file system without noexec",
    )


def _home(home: Path | None, swarm_key: Path | None) -> Iterator[Finding]:
    try:
        folder = Home.open(home)
        peer = folder.key.peer
        folder.settings()
    except P2PModelError as error:
        yield Finding("home", "bad", error.message, error.hint)
        return
    yield Finding("home", "ok", f"home {folder.path}, peer {peer}")
    try:
        key = folder.swarm_key(swarm_key)
    except P2PModelError as error:
        yield Finding("home", "bad", error.message, error.hint)
    else:
        if key is not None:
            yield Finding("home", "ok", f"only for a private swarm, with the key {key.fingerprint}")
    free = shutil.disk_usage(folder.path).free
    if free > LITTLE_DISK:
        yield Finding("disk", "ok", f"{free / 1e9:.1f} GB free")
    else:
        advice = "free some: p2pmodel gc --dry-run says what it could remove, or use a --home on another disk"
        yield Finding("disk", "bad", f"only {free / 1e6:.0f} MB free", advice)


def _memory() -> Finding:
    """What the container's limit leaves, where there is one."""
    available = free_bytes(Device())
    text = f"{available / 1e9:.1f} GB of memory available"
    if available > LITTLE_MEMORY:
        return Finding("memory", "ok", text)
    return Finding("memory", "note", text, "a node needs about 0.5 GB beside its layers: host fewer (--capacity)")


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    text = f"{'any number of' if soft == unlimited else soft} files and sockets may be open"
    if soft == unlimited or soft >= FEW_DESCRIPTORS:
        return Finding("limits", "ok", text)
    most = 65536 if hard == unlimited else hard
    more = f"run `ulimit -n {most}` before p2pmodel join" if most > soft else "raise the hard limit"
    return Finding("limits", "note", text, f"enough for a few sessions; {more} (LimitNOFILE= in a systemd unit)")


def _clock() -> Finding:
    """Leases are valid by the clock. The kernel knows whether something keeps it right; that needs no network."""
    adjtimex = getattr(ctypes.CDLL(None, use_errno=True), "adjtimex", None)
    state = -1 if adjtimex is None else adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    if 0 <= state < _TIME_ERROR:
        return Finding("clock", "ok", "the clock is synchronised")
    advice = "`timedatectl set-ntp true`, unless the host of this container or virtual machine does it"
    what = "nothing here says that the clock is synchronised" if state < 0 else "the clock is not synchronised"
    return Finding("clock", "note", what, f"{advice}; compare it with a peer's: p2pmodel doctor --peers ADDRESS")


def check_ports(host: str, port: int) -> Iterator[Finding]:
    """Whether `port` for peers, and the next one for gossip, can be listened on; 0: any at all."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number, use in ((port, "peers"), (port + 1, "gossip")) if port else ((0, ""),):
        try:
            with socket.create_server((host, number), family=family):
                what = f"port {number} on {host} is free for {use}" if port else f"ports can be opened on {host}"
                yield Finding("ports", "ok", what)
        except OSError as error:
            what = f"port {number or 'of any number'} on {host} can't be opened: {error.strerror}"
            advice = f"`ss -ltnp 'sport = :{number}'` shows who has it; or choose another --port"
            yield Finding("ports", "bad", what, advice if port else "check the address, the firewall or the sandbox")
