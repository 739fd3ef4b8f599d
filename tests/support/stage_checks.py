"""Stages of a checkpoint against the whole model, bit by bit, whatever the family: the checks of one type.

The chain runs in this process, stage after stage; every check raises AssertionError where a bit differs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.domain.swarm import Span
from p2pmodel.engine import family
from p2pmodel.engine.checkpoint import Checkpoint
from p2pmodel.engine.head import NO_VECTORS, RemoteCache, RemoteTape
from p2pmodel.engine.stage import Stage, load_stage
from p2pmodel.engine.steps import Note
from tests.support.families import VOCABULARY

PROMPT, NEW_TOKENS, ROOM = 7, 48, 64
PARTS = (1, 1, 5, 1)
"""Lengths of what follows the prompt in one session."""


@dataclass
class StageChain:
    """Implements `engine.head.RemoteChain` by calling stages."""

    stages: Sequence[Stage]
    open_sessions: list["StageChainSession"] = field(default_factory=list)

    def open(
        self, max_tokens: int, rows: int, rewinds: bool, vectors: Mapping[str, Tensor] = NO_VECTORS
    ) -> "StageChainSession":
        caches = [stage.new_cache(stage.span, max_tokens, rewinds) for stage in self.stages]
        session = StageChainSession(self, caches)
        self.open_sessions.append(session)
        return session

    def tape(self) -> RemoteTape:
        raise AssertionError("nothing is trained here")

    def close(self) -> None:
        assert not self.open_sessions


@dataclass
class StageChainSession:
    chain: StageChain
    caches: list[Any]

    def forward(self, hidden: Tensor, position: int, note: Note) -> Tensor:
        assert note.mask is None or bool(note.mask.all()), "padded rows are compared stage by stage"
        assert all(cache.seen == position for cache in self.caches)
        for stage, cache in zip(self.chain.stages, self.caches, strict=True):
            hidden = stage.forward(hidden, cache, stage.span, position_ids=note.positions)
        return hidden.float() if note.wanted is None else hidden[:, hidden.shape[1] - note.wanted :].float()

    def close(self) -> None:
        self.chain.open_sessions.remove(self)


def spans_of(checkpoint: Checkpoint, stages: int) -> list[Span]:
    """Unequal, so that kinds of layers that alternate are met in every order."""
    layers = checkpoint.layers
    cuts = {2: [0, max(1, layers // 2 - 1)], 3: [0, 1, layers - 1]}[min(stages, layers)]
    return [Span(start, end) for start, end in zip(cuts, [*cuts[1:], layers], strict=True)]


def load_chain(checkpoint: Checkpoint, stages: int) -> StageChain:
    return StageChain([load_stage(checkpoint, span) for span in spans_of(checkpoint, stages)])


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed + length))


@torch.inference_mode()
def check_prefill(whole: PreTrainedModel, head: PreTrainedModel) -> None:
    ids = tokens(1, PROMPT)
    # Stages always have caches, with which some families round differently.
    same(head(input_ids=ids).logits, whole(input_ids=ids, use_cache=True).logits, "prefill")


@torch.inference_mode()
def check_cached(whole: PreTrainedModel, head: PreTrainedModel, chain: StageChain) -> None:
    """A prompt, then single tokens and several at once, each after the other."""
    name = family.cache_argument(whole.forward)
    theirs, ours = None, RemoteCache(chain, ROOM)
    seen = 0
    for number, length in enumerate((PROMPT, *PARTS)):
        arguments: dict[str, Any] = {"input_ids": tokens(1, length, number), "use_cache": True}
        if "position_ids" in family.parameters_of(whole.forward):  # as generate() does: not all families count
            arguments["position_ids"] = torch.arange(seen, seen + length).unsqueeze(0)
        seen += length
        expected = whole(**arguments, **({} if theirs is None else {name: theirs}))
        theirs = expected.get(name)
        assert theirs is not None, "the whole model gives no cache"
        same(head(**arguments, **{name: ours}).logits, expected.logits, f"part {number}")
    ours.close()


@torch.inference_mode()
def check_rows(whole: PreTrainedModel, stages: Sequence[Stage]) -> None:
    """Three rows, two of them padded on the left: a prompt and two tokens, by what goes in and out of the layers."""
    name = family.cache_argument(whole.forward)
    mask = torch.ones(3, PROMPT, dtype=torch.long)
    mask[1, :3] = mask[2, :1] = 0
    ids = tokens(3, PROMPT) * mask
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
    takes_positions = "position_ids" in family.parameters_of(whole.forward)
    caches = [stage.new_cache(stage.span, ROOM) for stage in stages]
    for step in range(3):
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)[:, -inputs["input_ids"].shape[1] :]
        if takes_positions:
            inputs["position_ids"] = positions
        with watched(whole, stages) as edges:
            outputs = whole(**inputs)
        for stage, cache in zip(stages, caches, strict=True):
            ours = stage.forward(
                edges[stage.span.start],
                cache,
                stage.span,
                position_ids=positions,
                attention_mask=inputs["attention_mask"],
            )
            same(ours, edges[stage.span.end], f"rows of layers {stage.span}, step {step}")
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
        inputs = {"input_ids": tokens(3, 1, step), "attention_mask": mask, "use_cache": True, name: outputs[name]}


@contextmanager
def watched(whole: PreTrainedModel, stages: Sequence[Stage]) -> Iterator[dict[int, Tensor]]:
    """By layer: the hidden states that go into it in the whole model, and what comes out of the last."""
    layers = list(whole.get_submodule(family.find_stack(whole, stages[-1].checkpoint.layers)).children())
    edges: dict[int, Tensor] = {}

    def enter(index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            edges[index] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).clone()

        return hook

    def leave(index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            edges[index + 1] = (output[0] if isinstance(output, tuple | list) else output).clone()

        return hook

    handles = []
    for stage in stages:
        handles.append(layers[stage.span.start].register_forward_pre_hook(enter(stage.span.start), with_kwargs=True))
        handles.append(layers[stage.span.end - 1].register_forward_hook(leave(stage.span.end - 1)))
    try:
        yield edges
    finally:
        for handle in handles:
            handle.remove()


def greedy(model: PreTrainedModel) -> list[int]:
    ids = tokens(1, PROMPT)
    mask = torch.ones_like(ids)
    out: Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    return out[0].tolist()


def same(ours: Tensor, theirs: Tensor, what: str) -> None:
    if not torch.equal(ours, theirs):
        gap = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else "shape"
        raise AssertionError(f"{what} differs ({gap})")


def check_greedy(whole: PreTrainedModel, heads: Sequence[PreTrainedModel]) -> None:
    expected = greedy(whole)
    for head in heads:
        assert greedy(head) == expected, "48 greedy tokens differ"


@torch.inference_mode()
def check_half(stages: Sequence[Stage]) -> None:
    """A prompt and a token after it come out finite, in the dtypes of less than 32 bits."""
    hidden = torch.randn(1, PROMPT, stages[0].width, generator=torch.Generator().manual_seed(1))
    for stage in stages:
        cache = stage.new_cache(stage.span, ROOM)
        for part in (hidden, hidden[:, :1]):
            output = stage.forward(part, cache, stage.span)
            assert output.shape == part.shape
            assert bool(output.isfinite().all()), "it is not finite"
