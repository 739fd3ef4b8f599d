"""Modular experts on a model's layers: hooks that add what the routers' choice makes of a layer's output."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from p2pmodel.domain.modular import place_of
from p2pmodel.tensors.smear import Adapter, Course, Decide, Pools, pools, softmax


class Running(Protocol):
    """What a forward asks at each layer."""

    def update(self, layer: str, hidden: Tensor) -> Tensor | None: ...


class Hooks:
    """On the layers that are there. Nothing is added but within `running`; one forward at a time."""

    def __init__(self, base: nn.Module, layers: Iterable[str]) -> None:
        self._running: Running | None = None
        modules = dict(base.named_modules())
        # Before other hooks, which may end the forward.
        self._handles: list[RemovableHandle] = [
            modules[layer].register_forward_hook(self._hook(layer), prepend=True)
            for layer in sorted(set(layers))
            if layer in modules
        ]

    @contextmanager
    def running(self, course: Running | None) -> Iterator[None]:
        before, self._running = self._running, course
        try:
            yield
        finally:
            self._running = before

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, layer: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self._running is None:
                return None
            hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
            update = self._running.update(layer, hidden)
            if update is None:
                return None
            changed = (hidden.float() + update).to(hidden.dtype)
            return type(output)([changed, *output[1:]]) if isinstance(output, tuple | list) else changed

        return hook


class Together:
    """Single tokens of several sessions in one forward, each at its own version: those whose routers have decided are
    computed as one batch. rows: of each in the batch; a session without experts has no course."""

    def __init__(self, courses: Sequence[Course | None], rows: Sequence[slice]) -> None:
        self._courses, self._rows = courses, rows

    def update(self, layer: str, hidden: Tensor) -> Tensor | None:
        settled: list[tuple[slice, Adapter]] = []
        own: list[tuple[slice, Tensor]] = []
        for course, rows in zip(self._courses, self._rows, strict=True):
            if course is None or layer not in course.pools:
                continue
            adapter = course.settled(layer)
            if adapter is not None:
                settled.append((rows, adapter))
            elif (update := course.update(layer, hidden[rows])) is not None:
                own.append((rows, update))
        if settled:
            merged = Adapter.stacked([adapter for _, adapter in settled])
            updates = merged.update(torch.cat([hidden[rows] for rows, _ in settled]))
            sizes = [rows.stop - rows.start for rows, _ in settled]
            parts = torch.split(updates, sizes)
            own += [(rows, part) for (rows, _), part in zip(settled, parts, strict=True)]
        if not own:
            return None
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for rows, update in own:
            total[rows] = update
        return total


class Applier:
    """A `patch_kind.Applier` of a whole model: a forward without a cache is an example of its own; with one, the
    example goes on where the cache ends."""

    def __init__(self, base: nn.Module, slots: Sequence[str], decide: Decide = softmax) -> None:
        places = [place_of(slot) for slot in slots]
        self._hooks = Hooks(base, [place.layer for place in places if place is not None])
        self._decide = decide
        self._pools: Pools = {}
        self._courses: WeakKeyDictionary[Any, Course] = WeakKeyDictionary()
        self._handle = base.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.course: type[Course] = Course
        self.latest: Course | None = None
        """Of the last forward."""

    @contextmanager
    def use(self, state: Mapping[str, Tensor] | None) -> Iterator[None]:
        """state: whole experts; slots of other kinds are passed over."""
        before = self._pools
        self._pools = pools(state or {})
        self._courses.clear()
        try:
            with self._hooks.running(self if self._pools else None):
                yield
        finally:
            self._pools = before
            self._courses.clear()

    def remove(self) -> None:
        self._hooks.remove()
        self._handle.remove()

    def update(self, layer: str, hidden: Tensor) -> Tensor | None:
        course = self.latest
        return course.update(layer, hidden) if course is not None and layer in course.pools else None

    def _begin(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._pools:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        tokens = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        start = 0 if cache is None else int(cache.get_seq_length())
        course = None if cache is None or not start else self._courses.get(cache)
        if course is None:
            course = self.course(self._pools, self._decide)
        if cache is not None:
            self._courses[cache] = course
        real = mask[:, -tokens:].bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        course.begin(start, tokens, real)
        self.latest = course
