"""How well a model at a state predicts texts, in nats per token and per byte; for exams and for everybody else."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.tensors.kinds import Applier, PatchKind

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


@dataclass(frozen=True)
class _Batch:
    """texts: which text each row is of; ids [B, T + 1] int64; real [B, T] bool: what is no padding."""

    texts: list[int]
    ids: Tensor
    real: Tensor

    @classmethod
    def of(cls, windows: list[tuple[int, list[int]]]) -> "_Batch":
        longest = max(len(ids) for _, ids in windows)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids in windows], dtype=torch.int64)
        lengths = torch.tensor([len(ids) - 1 for _, ids in windows])
        return cls([text for text, _ in windows], ids, torch.arange(longest - 1) < lengths[:, None])


class Scorer:
    """Sums of nats of a fixed list of texts; cut and encoded once, scored at any number of states.

    A text is one window of tokens when it fits the model's context (at most 1024), and else several that follow each
    other, each beginning with the last token of the one before. Its first token is predicted from the begin- or
    end-of-text token, or not at all when the tokenizer has neither. Windows of similar length go together.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self._model = model
        config = model.config.get_text_config()
        longest = min(MAX_WINDOW, int(getattr(config, "max_position_embeddings", None) or MAX_WINDOW))
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.tokens = [0] * len(texts)
        windows: list[tuple[int, list[int]]] = []
        for index, text in enumerate(texts):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids = ids if start is None else [int(start), *ids]
            self.tokens[index] = max(0, len(ids) - 1)
            windows += [(index, ids[at : at + longest + 1]) for at in range(0, len(ids) - 1, longest)]
        self._batches = _batches(windows, int(config.vocab_size))

    @torch.inference_mode()
    def nats(self, applier: Applier, state: Mapping[str, Tensor]) -> list[float]:
        """Of every text, summed over its tokens. The model is left as it was."""
        training = self._model.training
        self._model.train(False)
        sums = [0.0] * len(self.tokens)
        try:
            with applier.use(state):
                for batch in self._batches:
                    nats = token_nats(self._model, batch.ids.to(self._model.device)).cpu().to(torch.float64)
                    rows = torch.where(batch.real, nats, 0.0).sum(1).tolist()
                    for index, value in zip(batch.texts, rows, strict=True):
                        sums[index] += value
        finally:
            self._model.train(training)
        return sums


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: PatchKind,
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
def attached(model: PreTrainedModel, kind: PatchKind, slots: Iterable[str]) -> Iterator[Applier]:
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


def _batches(windows: list[tuple[int, list[int]]], vocabulary: int) -> list[_Batch]:
    """Padded at the end, where causal attention does not look, so that no mask is needed."""
    batches: list[_Batch] = []
    batch: list[tuple[int, list[int]]] = []
    room = min(BATCH_TOKENS, MAX_LOGITS // vocabulary)
    for window in sorted(windows, key=lambda window: (len(window[1]), window[0])):
        if batch and (len(batch) + 1) * len(window[1]) > room:
            batches.append(_Batch.of(batch))
            batch = []
        batch.append(window)
    return [*batches, _Batch.of(batch)] if batch else batches
