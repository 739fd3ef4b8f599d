"""How much memory a session takes on a stage: what its cache holds, per token and whatever its length."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from p2pmodel.engine.stage import Stage

MEASURED = (8, 24)
"""Tokens of the two caches that are compared."""

TYPICAL_TOKENS = 512
"""Of a session, to spread over what it holds at any length, as recurrent layers do."""


@dataclass(frozen=True)
class CacheCost:
    """Bytes of one session of one row that runs the whole span: fixed + per_token times its tokens. Layers with windows
    hold less of long sessions than this says."""

    per_token: float
    fixed: float

    @property
    def typical(self) -> float:
        """Bytes of one position of a session of usual length."""
        return self.per_token + self.fixed / TYPICAL_TOKENS

    def tokens_in(self, size: int) -> int:
        """How many positions of sessions of usual length fit into `size` bytes; at least one."""
        return max(1, int(size / self.typical)) if self.typical else size


def measure_cache(stage: "Stage") -> CacheCost:
    """Runs two prompts and looks at what their caches hold."""
    short, long = (_cache_bytes(stage, tokens) for tokens in MEASURED)
    per_token = max(0.0, (long - short) / (MEASURED[1] - MEASURED[0]))
    return CacheCost(per_token, max(0.0, short - MEASURED[0] * per_token))


def held(layer: Any) -> Iterator[Tensor]:
    """The tensors of a cache's layer, by whatever attributes it keeps them."""
    for value in vars(layer).values():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        yield from (part for part in parts if isinstance(part, Tensor) and part.numel())


@torch.inference_mode()
def _cache_bytes(stage: "Stage", tokens: int) -> int:
    cache = stage.new_cache(stage.span, tokens)
    hidden = torch.zeros(1, tokens, stage.width)
    stage.forward(hidden, cache, stage.span)
    layers = cache.layers[stage.span.start : stage.span.end]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for x in layers for t in held(x)}
    return sum(storages.values())
