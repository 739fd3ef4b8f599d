"""How many CPU threads this process computes with."""

import torch


def use_threads(count: int | None) -> None:
    """None leaves PyTorch's default, all cores; several nodes on one machine are better off with a share each."""
    if count is not None:
        torch.set_num_threads(count)
