"""KV caches: of a stage, which holds the layers of one span, and of the client, which holds none.

transformers derives masks and positions from the cache (`get_seq_length`, `get_query_offset`, `get_mask_sizes`), not
from arguments, so both kinds have to answer for layers that are elsewhere. That interface is semi-private: it holds
for transformers 5.23.
"""

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from p2pmodel.domain.swarm import Span
from p2pmodel.tensors.smear import Course

FIRST_ROOM = 16


def attends_only(config: PreTrainedConfig) -> bool:
    """Whether all layers of the family keep keys and values, and nothing that can't be put back: no recurrent states.
    Only then can tokens be taken back, and several at once follow others as they would have one by one."""
    cache = DynamicCache(config=config)
    kinds: set[Any] = {type(layer) for layer in cache.layers} or {cache.layer_class_to_replicate}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


class StageCache(DynamicCache):
    """The cache of one session on one stage. `seen`: tokens that every layer of the span has taken in; `course`: what
    the session's routers have seen, where its version has experts.

    rewinds: whether `rewind` may go back; families that can't (see `attends_only`) raise NotImplementedError.
    """

    def __init__(self, config: PreTrainedConfig, span: Span, max_tokens: int, rewinds: bool = False) -> None:
        super().__init__(config=config)
        if rewinds and not attends_only(config):
            raise NotImplementedError(f"{config.model_type} keeps states that cannot be taken back")
        self.span = span
        self.max_tokens = max_tokens
        self.seen = self._last = 0
        self.course: Course | None = None
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
        self.rewinds = rewinds
        if rewinds:
            self.activate_past_recording()  # type: ignore[no-untyped-call]

    def rewind(self, position: int) -> None:
        """Forgets the tokens from `position` on. A cache that rewinds has to be told before every step how far it goes
        back, be it not at all: until then a window keeps what it would have dropped, and no longer.

        Raises ValueError for a position before that of the last step."""
        if not self._last <= position <= self.seen:
            raise ValueError(
                f"from {self.seen}, after a step that began at {self._last}, there is no way to {position}"
            )
        if self.seen:
            for layer in self._hosted():
                layer.crop(position - self.seen)
        self.seen = self._last = position

    @property
    def keeps_all(self) -> bool:
        """Whether the keys and values of every token are there, so that a part of it is what a shorter session has."""
        return all(isinstance(layer, RoomyLayer) for layer in self._hosted())

    def take_over(self, source: "StageCache", tokens: int) -> None:
        """The first `tokens` of another session's cache of the same span, into this one, which is empty."""
        for layer, other in zip(self._hosted(), source._hosted(), strict=True):
            layer.update(other.keys[..., :tokens, :], other.values[..., :tokens, :])
        self.seen = tokens

    def start_at(self, position: int) -> None:
        """Before the first step: forgets what was taken over from `position` on."""
        for layer in self._hosted():
            layer.crop(position - self.seen)
        self.seen = self._last = position

    def trim(self, tokens: int) -> None:
        """After the last step: keeps the first `tokens`, and gives back the memory of the rest."""
        for layer in self._hosted():
            layer.trim(tokens)
        self.seen = tokens

    def reorder(self, order: Tensor) -> None:
        """Each row goes on from row order[row], [B]."""
        for layer in self._hosted():
            layer.reorder_cache(order)
        if self.course is not None:
            self.course.reorder(order)

    def _hosted(self) -> list[Any]:
        return self.layers[self.span.start : self.span.end]

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

    def trim(self, tokens: int) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[..., :tokens, :].clone(), self.values[..., :tokens, :].clone()
        self._buffers = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._buffers = None  # the views have become copies


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
    record_past = False

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
    """Counts tokens; the keys and values are elsewhere."""

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
        raise NotImplementedError("keys and values are elsewhere")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("keys and values are elsewhere")

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("keys and values are elsewhere")

    def activate_past_recording(self) -> None:
        raise NotImplementedError("keys and values are elsewhere")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError("keys and values are elsewhere")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotImplementedError("keys and values are elsewhere")
