"""What a node computes on."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from p2pmodel.domain.errors import UsageError

if TYPE_CHECKING:
    from p2pmodel.engine.stage import Stage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SCHEMES = ("int8", "nf4")
"""Of weights alone, see `engine.quantisation`."""

RAM_SHARE, GPU_SHARE = 0.25, 0.6
"""Of what is free when the span is loaded: how much caches may take. The rest of the RAM is the user's; on a GPU a
forward needs some for itself."""
GRAPH_SHARE = 0.15
"""The same, of the graphs of micro-batches that wait for their gradients."""

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Device:
    """Where and in what precision to compute. name: a torch device; dtype: a key of DTYPES, or one of SCHEMES;
    wide: a key of DTYPES, what is computed in; cache_memory: bytes for the caches of all sessions, None for a share of
    what is free."""

    name: str = "cpu"
    dtype: str = "fp32"
    wide: str = "fp32"
    cache_memory: int | None = None

    @property
    def scheme(self) -> str:
        """Of `quantisation`, or empty."""
        return self.dtype if self.dtype in SCHEMES else ""


def choose_device(gpu: int | None, dtype: str | None = None, cache_memory: int | None = None) -> Device:
    """The GPU of that number, or the CPU for None. dtype: None for the one that the device is best at.

    Raises UsageError when the machine has no such GPU, and for a dtype that is unknown or that it cannot do."""
    if dtype is not None and dtype not in (*DTYPES, *SCHEMES):
        raise UsageError(f"There is no dtype {dtype[:32]!r}.", f"Use one of {', '.join((*DTYPES, *SCHEMES))}.")
    if gpu is None:
        _demand_library(dtype, "cpu")
        return Device("cpu", dtype or "fp32", dtype or "fp32", cache_memory)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu >= count or gpu < 0:
        have = f"only GPUs 0 to {count - 1}" if count else "no GPU that this PyTorch can use"
        raise UsageError(f"There is no GPU {gpu}: this machine has {have}.", "Use --cpu, or see: p2pmodel doctor")
    name = f"cuda:{gpu}"
    with torch.cuda.device(gpu):
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    _demand_library(dtype, name)
    chosen = dtype or best
    return Device(name, chosen, best if chosen in SCHEMES else chosen, cache_memory)


def free_bytes(device: Device) -> int:
    """Memory that is free there now, for this process."""
    if device.name != "cpu":
        return int(torch.cuda.mem_get_info(device.name)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):  # no container, or one of another kind
        return free


def gpu_busy(device: Device) -> float | None:
    """Share of the last second or less in which the GPU computed anything, for anybody. None where the library
    nvidia-ml-py is not installed, or the driver does not tell."""
    try:
        library = import_module("pynvml")
    except ImportError:
        return None
    try:
        return torch.cuda.utilization(device.name) / 100
    except (RuntimeError, library.NVMLError):
        return None


def cached_tokens(device: Device, stage: "Stage") -> int:
    """How many positions all sessions on this stage together may keep."""
    from p2pmodel.engine.memory import measure_cache  # loads transformers, as hosting does

    share = RAM_SHARE if device.name == "cpu" else GPU_SHARE
    size = device.cache_memory if device.cache_memory is not None else int(share * free_bytes(device))
    return measure_cache(stage).tokens_in(size)


def graph_bytes(device: Device) -> int:
    """How much memory micro-batches that wait for their gradients may take."""
    return int(GRAPH_SHARE * free_bytes(device))


def _demand_library(dtype: str | None, device: str) -> None:
    if dtype in SCHEMES:
        from p2pmodel.engine.quantisation import require_library  # loads transformers

        require_library(dtype, device)
