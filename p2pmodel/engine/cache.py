"""KV caches: of a stage, which holds the layers of one span, and of the client, which holds none.

transformers derives masks and positions from the cache (`get_seq_length`, `get_query_offset`, `get_mask_sizes`), not
from arguments, so both kinds have to answer for layers that are elsewhere. That interface is semi-private: it holds
for transformers 5.23.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from p2pmodel.domain.swarm import Span

FIRST_ROOM = 16


class StageCache(DynamicCache):
    """The cache of one session on one stage. `seen`: tokens that every layer of the span has taken in."""

    def __init__(self, config: PreTrainedConfig, span: Span, max_tokens: int) -> None:
        super().__init__(config=config)
        self.span = span
        self.max_tokens = max_tokens
        self.seen = 0
        layers = self.layers
        if self.layer_class_to_replicate is not None:
            count = config.get_text_config(decoder=True).num_hidden_layers
            layers.extend(self.layer_class_to_replicate() for _ in range(count - len(layers)))
        kinds = [type(layer) for layer in layers]
        hosted: dict[type, Any] = {}
        for index in range(span.start, min(span.end, len(layers))):
            if kinds[index] is DynamicLayer:
                layers[index] = RoomyLayer(max_tokens)
            hosted.setdefault(kinds[index], layers[index])
        for index, layer in enumerate(layers):
            if index not in span and isinstance(layer, CacheLayerMixin):
                layers[index] = ElsewhereLayer(self, hosted.get(kinds[index]), getattr(layer, "is_sliding", False))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.seen

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        if layer_idx is None:
            return self.seen > 0
        known: bool = super().has_previous_state(layer_idx, state_idx)
        return known


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values [B, heads, T, D] as views of buffers that double, instead of a copy of all at every token."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._max_tokens = max_tokens
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.get_seq_length()
        end = seen + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            room = max(end, min(max(2 * end, FIRST_ROOM), self._max_tokens))
            self._buffers = _grown(self.keys, key_states, room), _grown(self.values, value_states, room)
        key_buffer, value_buffer = self._buffers
        key_buffer[..., seen:end, :] = key_states
        value_buffer[..., seen:end, :] = value_states
        self.keys, self.values = key_buffer[..., :end, :], value_buffer[..., :end, :]
        return self.keys, self.values


def _grown(held: Tensor | None, new: Tensor, room: int) -> Tensor:
    buffer = new.new_empty(*new.shape[:-2], room, new.shape[-1])
    if held is not None and held.numel():
        buffer[..., : held.shape[-2], :] = held
    return buffer


class ElsewhereLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Of a layer that another stage hosts. Masks are sized by whichever layer of a type comes first, hosted or not, so
    it answers as a hosted one of its type would."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: StageCache, like: Any, is_sliding: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._like = like
        self.is_sliding = is_sliding
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self._cache.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self._like is None:
            return self._cache.seen + query_length, 0
        sizes: tuple[int, int] = self._like.get_mask_sizes(query_length)
        return sizes

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("this layer is hosted elsewhere")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("this layer is hosted elsewhere")


class CountingCache(DynamicCache):
    """The client's: it counts tokens, and the stages hold what they left."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return []

    @property
    def is_linear(self) -> list[bool]:
        return []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.seen > 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the client hosts no layers")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise NotImplementedError("sessions of the swarm have one row")

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("stages keep what they have seen")
