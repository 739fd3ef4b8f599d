"""One answer through the swarm, written in a thread of its own: its tokens, its text, and where it ends.

The model's own `generate()` runs, with a logits processor that chooses the token itself and leaves only that one: so
families with inputs and caches of their own need nothing further, and each answer has a random generator of its own.
"""

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from p2pmodel.engine.family import cache_argument
from p2pmodel.engine.head import RemoteCache
from p2pmodel.gateway.ports import Piece, Sampling, TokenScore
from p2pmodel.logic.stopping import StopScanner
from p2pmodel.node.asking.inference import RoutedChain

CONTEXT_TOKENS = 8
"""Of the prompt, that the answer's text is decoded with: some tokenizers drop a space at the beginning."""
MAX_PARTIAL_TOKENS = 8
"""That wait to become a character: four bytes at most, and room for tokens without text."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]


class Writer:
    """Answer number `index` to a prompt. `run` in one thread; `cancel` from any."""

    def __init__(
        self,
        index: int,
        ids: Tensor,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
        top_logprobs: int | None,
    ) -> None:
        """ids: int64 [1, T]."""
        self._index, self._ids, self._max_tokens, self._sampling = index, ids, max_tokens, sampling
        self._scanner, self._top_logprobs = StopScanner(stop), top_logprobs
        self._cancelled = threading.Event()
        self._chain: RoutedChain | None = None
        self.tokens = self.reused = self.failovers = self.bytes_sent = self.bytes_received = 0
        self.prompt_tokens = ids.shape[1]
        self.began = self.first = self.latest = 0.0
        """When it began, and when its first and its latest token came, by the monotonic clock."""

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chain: RoutedChain,
        vectors: Mapping[str, Tensor],
        show: Callable[[Piece], None],
    ) -> None:
        """Shows pieces, the last of which says how it ended. vectors: see `RemoteCache`. Raises as
        `RoutedSession.forward` does."""
        self._chain = chain
        self.began = time.monotonic()
        if self._cancelled.is_set():
            return
        chooser = _Chooser(self._sampling, self._index, self._ids.shape[1], self._top_logprobs)
        text = _Text(tokenizer, self._ids[0, -CONTEXT_TOKENS:].tolist())
        ends = _end_tokens(model, tokenizer)
        page = _Page(tokenizer, self._top_logprobs is not None)

        def written(token: int) -> bool:
            """Whether the answer ends with this token."""
            self.tokens += 1
            self.latest = time.monotonic()
            self.first = self.first or self.latest
            if self._cancelled.is_set():
                return True
            last = token in ends or self.tokens == self._max_tokens
            page.add("" if token in ends else text.add(token), None if token in ends else chooser.score)
            certain = self._scanner.feed(page.take_text())
            if last and not self._scanner.stopped:
                certain += self._scanner.feed(text.flush()) + self._scanner.flush()
            done = last or self._scanner.stopped
            finish = ("stop" if self._scanner.stopped or token in ends else "length") if done else None
            tokens = page.tokens_of(certain, rest=last and not self._scanner.stopped)
            if certain or tokens or finish:
                show(Piece(self._index, certain, tokens, finish))
            return done

        cache = RemoteCache(chain, self._ids.shape[1] + self._max_tokens, vectors=vectors)
        try:
            model.generate(  # type: ignore[operator]
                input_ids=self._ids,
                attention_mask=torch.ones_like(self._ids),
                max_new_tokens=self._max_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                logits_processor=LogitsProcessorList([chooser]),
                stopping_criteria=StoppingCriteriaList([_Ending(written)]),
                **{cache_argument(model.forward): cache},
            )
        finally:
            cache.close()
            if chain.last is not None:
                self.reused, self.failovers = chain.last.reused_tokens, chain.last.failovers
                self.bytes_sent, self.bytes_received = chain.last.traffic

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """The answer ends at once, and its session with it. Blocks for a moment; doing it twice is doing it once."""
        self._cancelled.set()
        if self._chain is not None:
            self._chain.abandon()


class _Chooser(LogitsProcessor):
    """`score` is the last choice's."""

    def __init__(self, sampling: Sampling, index: int, prompt_tokens: int, top: int | None) -> None:
        self._sampling, self._prompt_tokens, self._top = sampling, prompt_tokens, top
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed((sampling.seed + index) % (1 << 63))
        self._warpers = LogitsProcessorList()
        if sampling.temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self.score: _Score | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """[1, T], [1, V] -> [1, V], minus infinity but for the token chosen."""
        logits = self._adjusted(input_ids[0, self._prompt_tokens :], scores.float())
        if self._sampling.temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(self._warpers(input_ids, logits).softmax(-1), 1, generator=self._random)
        self.score = self._scored(int(token), scores[0].float()) if self._top is not None else None
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    def _adjusted(self, answer: Tensor, logits: Tensor) -> Tensor:
        sampling = self._sampling
        if sampling.frequency_penalty or sampling.presence_penalty:
            counts = torch.bincount(answer, minlength=logits.shape[1])[: logits.shape[1]]
            logits = logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
        if sampling.logit_bias:
            tokens, biases = zip(*sampling.logit_bias, strict=True)
            logits = logits.index_add(1, torch.tensor(tokens), torch.tensor([biases]))
        return logits

    def _scored(self, token: int, logits: Tensor) -> "_Score":
        logprobs = logits.log_softmax(-1)
        values, tokens = logprobs.topk(min(self._top or 0, len(logprobs)))
        return _Score(token, float(logprobs[token]), list(zip(tokens.tolist(), values.tolist(), strict=True)))


class _Score:
    def __init__(self, token: int, logprob: float, best: list[tuple[int, float]]) -> None:
        self.token, self.logprob, self.best = token, logprob, best


class _Ending(StoppingCriteria):
    def __init__(self, written: Callable[[int], bool]) -> None:
        self._written = written

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.tensor([self._written(int(input_ids[0, -1]))])


class _Text:
    """The text of tokens, as soon as it can't change any more: a character can be several tokens, and what a token
    reads as depends on the ones before."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: list[int]) -> None:
        self._tokenizer, self._ids = tokenizer, before
        self._start, self._read = 0, len(before)

    def add(self, token: int) -> str:
        self._ids.append(token)
        return self._take(unfinished=len(self._ids) - self._read <= MAX_PARTIAL_TOKENS)

    def flush(self) -> str:
        return self._take(unfinished=False)

    def _take(self, *, unfinished: bool) -> str:
        known, now = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if unfinished and now.endswith("�"):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Page:
    """Which tokens go with which text: scores wait for the text that they are of."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, scored: bool) -> None:
        self._tokenizer, self._scored = tokenizer, scored
        self._fresh = ""
        self._begun = 0
        self._shown = 0
        self._waiting: list[tuple[int, _Score]] = []

    def add(self, text: str, score: _Score | None) -> None:
        if self._scored and score is not None:
            self._waiting.append((self._begun, score))
        self._fresh += text
        self._begun += len(text)

    def take_text(self) -> str:
        text, self._fresh = self._fresh, ""
        return text

    def tokens_of(self, certain: str, *, rest: bool) -> tuple[TokenScore, ...]:
        """Those whose text begins in what is now shown; the rest too, at the end."""
        self._shown += len(certain)
        ready = [score for begins, score in self._waiting if rest or begins < self._shown]
        self._waiting = self._waiting[len(ready) :]
        return tuple(self._told(score) for score in ready)

    def _told(self, score: _Score) -> TokenScore:
        best = tuple((*self._named(token), logprob) for token, logprob in score.best)
        return TokenScore(*self._named(score.token), score.logprob, best)

    def _named(self, token: int) -> tuple[str, bytes]:
        text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        return text, token_bytes(self._tokenizer, token, text)


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int, text: str) -> bytes:
    """Also of a token that is no character alone, where its tokenizer is of a kind that writes bytes down."""
    if "�" not in text:
        return text.encode()
    name = str(tokenizer.convert_ids_to_tokens(token))
    if found := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(found[1], 16)])
    if all(character in _BYTE_OF for character in name):
        return bytes(_BYTE_OF[character] for character in name)
    return text.encode()


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    config = model.generation_config
    ends = config.eos_token_id if config is not None else None
    found = ends if isinstance(ends, list) else [ends]
    return frozenset(int(token) for token in (*found, tokenizer.eos_token_id) if isinstance(token, int))
