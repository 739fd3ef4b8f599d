"""What a family has to keep so that its layers can run on different machines, tried on a few tokens when a span is
loaded. A model that does not keep it is refused: in stages it would be wrong, and nobody would see it.

Between two stages only the hidden states travel. So a layer may take nothing else from the layers before it, nothing
that is computed from the token ids or by a module that is not hosted, and has to run exactly once in a forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import DummyLayer

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.swarm import Span
from p2pmodel.engine import family
from p2pmodel.engine.batching import SessionsCache
from p2pmodel.engine.memory import held

if TYPE_CHECKING:
    from p2pmodel.engine.stage import Stage

TOKENS = (3, 1)
"""Of the two forwards of a trial: what a prompt is, and what follows it."""

TOLERANCE = 1e-3
"""Relative, in fp32: of the hidden states of one run over those of another in which other modules stand by, and of what
the layers add to them where sessions share a forward."""


def try_out(stage: "Stage") -> None:
    """Finds the form in which the family's loop takes a layer's output, for the stand-ins to give it, and sets it.
    Raises InvalidInput that says what the family needs beyond the hidden states."""
    problem: Exception | None = None
    for arity in family.ARITIES:
        stage.scratch.arity = arity
        try:
            outputs = _run(stage, [stage.span])
            if not all(output.shape == hidden.shape for output, hidden in zip(outputs, _inputs(stage), strict=True)):
                raise ValueError(f"its layers give hidden states of shape {tuple(outputs[0].shape)}")
            _demand(_order_is_kept(stage), "they do not run their layers once each, one after the other")
            with _filled(stage.scratch, torch.nan):
                poisoned = _run(stage, [stage.span])
            _demand(_alike(stage, outputs, poisoned), "their layers use the embeddings, or modules outside of them")
            pieces = [Span(layer, layer + 1) for layer in range(stage.span.start, stage.span.end)]
            alone = _run(stage, pieces)
            _demand(_alike(stage, outputs, alone), "their layers tell each other more than the hidden states")
        except family.FAMILY_ERRORS as error:
            problem = problem or error
            continue
        return
    detail = family.first_line(problem) if problem else ""
    raise InvalidInput(f"Models of type {stage.checkpoint.architecture} cannot be split into stages: {detail}.")


def can_batch(stage: "Stage") -> bool:
    """Whether sessions of this family can share a forward, where their rows are summed in another order."""
    generator = torch.Generator().manual_seed(0)
    lengths, rows = (3, 5, 4), [1, 2, 1]
    prompts = [torch.randn(b, t, stage.width, generator=generator) for b, t in zip(rows, lengths, strict=True)]
    tokens = torch.randn(sum(rows), 1, stage.width, generator=generator)
    with torch.inference_mode():
        together, alone = ([stage.new_cache(stage.span, 16) for _ in rows] for _ in range(2))
        for caches in (together, alone):
            for prompt, cache in zip(prompts, caches, strict=True):
                stage.forward(prompt, cache, stage.span)
        try:
            batch = SessionsCache(together, rows, stage.base.config._attn_implementation)
            output = stage.forward_sessions(tokens, batch, stage.span)
        except (KeyError, *family.FAMILY_ERRORS):
            return False
        parts = zip(torch.split(tokens, rows), alone, strict=True)
        expected = torch.cat([stage.forward(part, cache, stage.span) for part, cache in parts])
    tokens = tokens.to(output)
    error, size = (output - expected).float().norm(dim=-1), (expected - tokens).float().norm(dim=-1)
    return bool((error <= _tolerance(stage) * size).all())


@torch.inference_mode()
def _run(stage: "Stage", spans: list[Span]) -> list[Tensor]:
    """The outputs of a prompt and of a token after it, through the spans one after the other."""
    caches = [stage.new_cache(span, sum(TOKENS)) for span in spans]
    outputs = []
    for hidden in _inputs(stage):
        for span, cache in zip(spans, caches, strict=True):
            hidden = stage.forward(hidden, cache, span)
        outputs.append(hidden)
    layers = [
        cache.layers[layer] for span, cache in zip(spans, caches, strict=True) for layer in range(span.start, span.end)
    ]
    silent = [layer for layer in layers if not isinstance(layer, DummyLayer) and next(held(layer), None) is None]
    _demand(not silent, "they keep nothing of the tokens that they have seen")
    return outputs


def _inputs(stage: "Stage") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, tokens, stage.width, generator=generator) for tokens in TOKENS]


def _alike(stage: "Stage", ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """What is not a number is like nothing, unless both are none in the same places: weights may overflow."""
    tolerance = _tolerance(stage)
    for our, their in zip(ours, theirs, strict=True):
        if not torch.equal(our.isfinite(), their.isfinite()):
            return False
        gap = (our.float() - their.float()).nan_to_num(0, 0, 0)
        if gap.norm() > tolerance * our.float().nan_to_num(0, 0, 0).norm():
            return False
    return True


def _tolerance(stage: "Stage") -> float:
    """In fp32 runs have the same bits, or nearly; in less, families that keep a wider residual lose it at each edge."""
    precision = torch.finfo(stage.dtype).eps / torch.finfo(torch.float32).eps
    return float(min(0.1, TOLERANCE * precision**0.5))


def _order_is_kept(stage: "Stage") -> bool:
    """Lets the family's loop run on behind the span, and sees which layers it calls."""
    calls = stage.watch(_inputs(stage)[0])
    return len(calls) >= stage.span.end and calls == list(range(len(calls)))


def _demand(kept: bool, sentence: str) -> None:
    if not kept:
        raise ValueError(sentence)


@contextmanager
def _filled(scratch: family.Scratch, value: float) -> Iterator[None]:
    scratch.filling = value
    try:
        yield
    finally:
        scratch.filling = 0.0
