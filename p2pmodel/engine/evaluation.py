"""How well a model at a state predicts texts, in nats per token and per byte; for exams and for everybody else."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.tensors.patch_kind import Applier, Runs

MAX_WINDOW = 1024
BATCH_TOKENS = 4096
MAX_LOGITS = 64 << 20
"""Elements of one batch's logits; a batch holds at least one window."""


@dataclass(frozen=True)
class Evaluation:
    nats_per_token: float
    nats_per_byte: float
    tokens: int
    bytes: int


class Continuation(NamedTuple):
    """A text of which only what follows the prompt counts."""

    prompt: str
    text: str


class _Window(NamedTuple):
    """`text`: which one it is of; `first`: the first of its predicted tokens that counts."""

    text: int
    ids: list[int]
    first: int = 0


@dataclass(frozen=True)
class _Batch:
    """texts: which text each row is of; ids [B, T + 1] int64; real [B, T] bool: the predicted tokens that count."""

    texts: list[int]
    ids: Tensor
    real: Tensor

    @classmethod
    def of(cls, windows: list[_Window]) -> "_Batch":
        longest = max(len(window.ids) for window in windows)
        ids = torch.tensor([w.ids + [0] * (longest - len(w.ids)) for w in windows], dtype=torch.int64)
        ends = torch.tensor([len(window.ids) - 1 for window in windows])[:, None]
        firsts = torch.tensor([window.first for window in windows])[:, None]
        places = torch.arange(longest - 1)
        return cls([window.text for window in windows], ids, (places >= firsts) & (places < ends))


class Scorer:
    """Sums of nats of a fixed list of texts; cut and encoded once, scored at any number of states.

    A text is one window of tokens when it fits the model's context (at most 1024), and else several that follow each
    other, each beginning with the last token of the one before. Its first token is predicted from the begin- or
    end-of-text token, or not at all when the tokenizer has neither. Windows of similar length go together.

    Of a continuation only the text's own tokens count; prompt and text are encoded as one, blanks at the end of the
    prompt belong to the text, and of what does not fit the context the beginning is left out.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | Continuation]
    ) -> None:
        self._model = model
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self._start = [] if start is None else [int(start)]
        self._tokenizer, self._longest = tokenizer, context(model)
        self.tokens = [0] * len(texts)
        windows: list[_Window] = []
        for index, text in enumerate(texts):
            if isinstance(text, Continuation):
                windows.append(self._continued(index, text))
                self.tokens[index] = len(windows[-1].ids) - 1 - windows[-1].first
            else:
                ids = self._start + self._encode(text)
                self.tokens[index] = max(0, len(ids) - 1)
                cuts = range(0, len(ids) - 1, self._longest)
                windows += [_Window(index, ids[at : at + self._longest + 1]) for at in cuts]
        vocabulary = int(model.config.get_text_config().vocab_size)
        self._batches = _batches([window for window in windows if len(window.ids) > 1], vocabulary)

    def nats(self, applier: Applier, state: Mapping[str, Tensor]) -> list[float]:
        """Of every text, summed over its tokens. The model is left as it was."""
        with applier.use(state):
            return self.sums()

    @torch.inference_mode()
    def sums(self) -> list[float]:
        """Of every text, with the model as it is now."""
        training = self._model.training
        self._model.train(False)
        sums = [0.0] * len(self.tokens)
        try:
            for batch in self._batches:
                nats = token_nats(self._model, batch.ids.to(self._model.device)).cpu().to(torch.float64)
                rows = torch.where(batch.real, nats, 0.0).sum(1).tolist()
                for index, value in zip(batch.texts, rows, strict=True):
                    sums[index] += value
        finally:
            self._model.train(training)
        return sums

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _continued(self, index: int, pair: Continuation) -> _Window:
        prompt = pair.prompt.rstrip()
        before, whole = self._encode(prompt), self._encode(pair.prompt + pair.text)
        ids = self._start + whole
        # A token over the edge counts as the text's; at least the last token does.
        first = max(0, min(len(self._start) + len(before), len(ids) - 1) - 1)
        surplus = max(0, len(ids) - self._longest - 1)
        return _Window(index, ids[surplus:], max(0, first - surplus))


def context(model: PreTrainedModel) -> int:
    """Tokens that are scored at once: those that the model takes, at most 1024."""
    config = model.config.get_text_config()
    return min(MAX_WINDOW, int(getattr(config, "max_position_embeddings", None) or MAX_WINDOW))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: Runs,
    state: Mapping[str, Tensor],
    texts: Sequence[str],
) -> Evaluation:
    """Raises InvalidInput when the texts hold nothing to predict."""
    scorer = Scorer(model, tokenizer, texts)
    tokens, size = sum(scorer.tokens), sum(len(text.encode()) for text in texts)
    if not tokens:
        raise InvalidInput("The texts hold nothing to predict.", "Name a file with text in it.")
    with attached(model, kind, state) as applier:
        nats = sum(scorer.nats(applier, state))
    return Evaluation(nats / tokens, nats / size, tokens, size)


@contextmanager
def attached(model: PreTrainedModel, kind: Runs, slots: Iterable[str]) -> Iterator[Applier]:
    """An applier of the model's transformer, taken away again afterwards."""
    applier = kind.applier(model.base_model, sorted(slots))
    try:
        yield applier
    finally:
        applier.remove()


def token_nats(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[B, T + 1] int64 -> [B, T] float32: the loss at each token but the first."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def _batches(windows: list[_Window], vocabulary: int) -> list[_Batch]:
    """Padded at the end, where causal attention does not look, so that no mask is needed."""
    batches: list[_Batch] = []
    batch: list[_Window] = []
    room = min(BATCH_TOKENS, MAX_LOGITS // vocabulary)
    for window in sorted(windows, key=lambda window: (len(window.ids), window.text)):
        if batch and (len(batch) + 1) * len(window.ids) > room:
            batches.append(_Batch.of(batch))
            batch = []
        batch.append(window)
    return [*batches, _Batch.of(batch)] if batch else batches
