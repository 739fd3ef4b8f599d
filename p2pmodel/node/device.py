"""What a node computes on."""

from dataclasses import dataclass

import torch

from p2pmodel.domain.errors import UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Device:
    """Where and in what precision to compute. name: a torch device; dtype: a key of DTYPES; cached_tokens: the most
    that all sessions together may keep."""

    name: str = "cpu"
    dtype: str = "fp32"
    cached_tokens: int = 1 << 16


def choose_device(gpu: int | None) -> Device:
    """The GPU of that number, or the CPU for None. Raises UsageError when the machine has no such GPU."""
    if gpu is None:
        return Device()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu >= count or gpu < 0:
        have = f"only GPUs 0 to {count - 1}" if count else "no GPU that this PyTorch can use"
        raise UsageError(f"There is no GPU {gpu}: this machine has {have}.", "Use --cpu, or see: p2pmodel doctor")
    return Device(f"cuda:{gpu}", "bf16")
