"""A model on which cases are tried: what sections ask of it, at whatever state it is in."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import isfinite

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from p2pmodel.domain.errors import Rejected
from p2pmodel.engine.data.encoding import encode_prompt
from p2pmodel.engine.evaluation import Continuation, Scorer, attached
from p2pmodel.tensors.patch_kind import Runs

MAX_CACHED_TEXTS = 1 << 13


class Bench:
    """One thread at a time. `reference` holds the base version's nats of the continuations that sections compare."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._scorers: dict[tuple[str | Continuation, ...], Scorer] = {}
        self.reference: dict[Continuation, float] = {}

    @contextmanager
    def at(self, kind: Runs, state: Mapping[str, Tensor]) -> Iterator[None]:
        """Within: the model computes with the state. It is left as it was."""
        training = self._model.training
        self._model.train(False)
        try:
            with attached(self._model, kind, state) as applier, applier.use(state):
                yield
        finally:
            self._model.train(training)

    def refer(self, texts: Sequence[Continuation]) -> None:
        """Notes what the model, as it is now, makes of the texts."""
        new = [text for text in dict.fromkeys(texts) if text not in self.reference]
        self.reference.update(zip(new, self.nats(new), strict=True))

    def nats(self, texts: Sequence[str | Continuation]) -> list[float]:
        """Of every text, summed over its tokens; see `Scorer`. Raises Rejected("finite")."""
        key = tuple(texts)
        if key not in self._scorers:
            if sum(len(known) for known in self._scorers) + len(key) > MAX_CACHED_TEXTS:
                self._scorers.clear()
            self._scorers[key] = Scorer(self._model, self._tokenizer, texts)
        sums = self._scorers[key].sums()
        # Here, and not in the scores, since a share of failed cases shows nothing of it.
        if not all(isfinite(nats) for nats in sums):
            raise Rejected("finite", "The model's loss on the exam is not finite.")
        return [max(0.0, nats) for nats in sums]  # rounding may leave what is certain a hair below

    @torch.inference_mode()
    def answer(self, prompt: str, tokens: int, stop: str = "") -> str:
        """The greedy continuation of at most `tokens` tokens, without the end-of-text token, up to `stop`. Of a prompt
        that does not fit the model's context the beginning is left out."""
        ids = encode_prompt(self._tokenizer, prompt) or self._end[:1]
        room = max(1, self._context - tokens)
        given = torch.tensor([ids[-room:]], device=self._model.device)
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, num_beams=1, max_new_tokens=tokens, eos_token_id=self._end, pad_token_id=self._end[0]
        )
        whole = self._model.generate(given, attention_mask=torch.ones_like(given), generation_config=config)  # type: ignore[operator]
        text = self._tokenizer.decode(whole[0, given.shape[1] :], skip_special_tokens=True)
        assert isinstance(text, str)
        return text.split(stop)[0] if stop else text

    @cached_property
    def _end(self) -> list[int]:
        """Tokens that end a text; the first token of the vocabulary where there is none, which then only pads."""
        config = self._model.generation_config
        ends = None if config is None else config.eos_token_id
        if ends is None:
            ends = self._tokenizer.eos_token_id
        return [0] if ends is None else [int(end) for end in (ends if isinstance(ends, list) else [ends])]

    @cached_property
    def _context(self) -> int:
        config = self._model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 1 << 20)
