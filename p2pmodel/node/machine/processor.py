"""Which processor computes here: on its make, and on what it can do at once, the last bits of a result depend."""

import hashlib
import platform
from functools import cache
from pathlib import Path

import torch

_FIELDS = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")


@cache
def processor() -> str:
    """The vector instructions that PyTorch uses, and a digest of make and abilities: `AVX512 3f2a9c01`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        lines = [f"model: {platform.processor() or platform.machine()}"]
    facts = {
        name.strip(): " ".join(sorted(value.split())) for name, _, value in (line.partition(":") for line in lines)
    }
    known = "\n".join(f"{name}: {facts[name]}" for name in _FIELDS if name in facts)
    return f"{torch.backends.cpu.get_cpu_capability()} {hashlib.sha256(known.encode()).hexdigest()[:8]}"
