"""What `p2pmodel doctor` looks at."""

import os
import shutil
import socket
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

from p2pmodel.domain.errors import P2PModelError
from p2pmodel.store.home import Home

PACKAGES = ("torch", "transformers", "hivemind", "libp2p", "grpcio", "safetensors")
LITTLE_DISK = 1 << 30


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "note", "bad"]
    what: str
    advice: str = ""


def examine_machine(home: Path | None) -> list[Finding]:
    return [_python(), *_packages(), _torch(), _daemon(), *_home(home), _memory(), _loopback()]


def _python() -> Finding:
    text = f"Python {sys.version.split()[0]}"
    return (
        Finding("ok", text)
        if (3, 11) <= sys.version_info[:2] < (3, 13)
        else Finding("bad", text, "use Python 3.11 or 3.12")
    )


def _packages() -> list[Finding]:
    findings = []
    for name in PACKAGES:
        try:
            findings.append(Finding("ok", f"{name} {version(name)}"))
        except PackageNotFoundError:
            findings.append(Finding("bad", f"{name} is not installed", "install p2pmodel again"))
    return findings


def _torch() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(
            "note",
            f"no GPU that this PyTorch can use; {torch.get_num_threads()} CPU threads",
            "p2pmodel runs on the CPU; for an NVIDIA GPU install a CUDA build of PyTorch (README)",
        )
    names = ", ".join(f"{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))
    return Finding("ok", f"GPU {names}")


def _daemon() -> Finding:
    from importlib.resources import files

    daemon = Path(str(files("hivemind") / "hivemind_cli" / "p2pd"))
    if os.access(daemon, os.X_OK):
        return Finding("ok", "the P2P daemon is there")
    return Finding(
        "bad", "hivemind's P2P daemon is missing or can't be executed", "install hivemind again from its wheel"
    )


def _home(home: Path | None) -> list[Finding]:
    try:
        folder = Home.open(home)
        peer = folder.key.peer
        folder.settings()
    except P2PModelError as error:
        return [Finding("bad", error.message, error.hint)]
    free = shutil.disk_usage(folder.path).free
    space = (
        Finding("ok", f"{free / 1e9:.1f} GB free")
        if free > LITTLE_DISK
        else Finding("bad", f"only {free / 1e6:.0f} MB free", "free some disk")
    )
    return [Finding("ok", f"home {folder.path}, peer {peer}"), space]


def _memory() -> Finding:
    available = psutil.virtual_memory().available
    text = f"{available / 1e9:.1f} GB of memory available"
    return (
        Finding("ok", text)
        if available > 1 << 30
        else Finding("note", text, "a node needs about 0.5 GB beside its layers")
    )


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)):
            return Finding("ok", "ports can be opened on loopback")
    except OSError as error:
        return Finding("bad", f"no port can be opened on 127.0.0.1: {error.strerror}", "check the firewall or sandbox")
