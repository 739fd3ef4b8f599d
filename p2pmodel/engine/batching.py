"""One forward for the next tokens of several sessions, at different lengths, versions and numbers of rows.

Everything but attention sees the sessions' rows as one batch. Attention is computed session by session, by the family's
own function over the session's own cache, so nothing is padded and nothing is copied (Orca's selective batching, Yu et
al., 2022). Families that attend in ways of their own don't fit: `trial.can_batch` finds that out by trying.
"""

import sys
from collections.abc import Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from p2pmodel.engine.cache import CountingCache, StageCache

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig

SESSION_BY_SESSION = "p2pmodel_sessions"
"""Not registered among the mask functions, so the family prepares no masks: every cached token may be attended to."""

_running: ContextVar["SessionsCache"] = ContextVar("the batch whose forward runs in this thread")


class SessionsCache(CountingCache):
    """The caches of several sessions for one forward of one token a row."""

    def __init__(self, caches: Sequence[StageCache], rows: Sequence[int], implementation: str) -> None:
        super().__init__()
        self.implementation = implementation
        self.caches = caches
        ends = torch.tensor(rows).cumsum(0).tolist()
        self.slices = [slice(end - count, end) for end, count in zip(ends, rows, strict=True)]
        self.seen = max(cache.seen for cache in caches)
        self.latest: list[tuple[Tensor, Tensor]] = []

    def positions(self) -> Tensor:
        """[B, 1], of the token that each row takes in."""
        column = [
            cache.seen
            for cache, rows in zip(self.caches, self.slices, strict=True)
            for _ in range(rows.stop - rows.start)
        ]
        return torch.tensor(column).unsqueeze(1)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.latest = [
            cache.update(key_states[rows], value_states[rows], layer_idx)
            for cache, rows in zip(self.caches, self.slices, strict=True)
        ]
        return key_states, value_states

    def finish(self) -> None:
        """After the forward: the sessions have taken in a token."""
        for cache in self.caches:
            cache.seen += 1

    @contextmanager
    def attending(self, config: "PreTrainedConfig") -> "Iterator[None]":
        before, token = config._attn_implementation, _running.set(self)
        config._attn_implementation = SESSION_BY_SESSION
        try:
            yield
        finally:
            config._attn_implementation = before
            _running.reset(token)


def attend_by_session(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [B, heads, 1, D]; keys and values are those of the caches."""
    batch = _running.get()
    attend = _family_attention(module, batch.implementation)
    outputs = [
        attend(module, query[rows], keys, values, None, **options)[0]
        for rows, (keys, values) in zip(batch.slices, batch.latest, strict=True)
    ]
    return torch.cat(outputs), None


def _family_attention(module: nn.Module, implementation: str) -> Any:
    if implementation == "eager":
        return sys.modules[type(module).__module__].__dict__["eager_attention_forward"]
    return ALL_ATTENTION_FUNCTIONS[implementation]


ALL_ATTENTION_FUNCTIONS.register(SESSION_BY_SESSION, attend_by_session)
