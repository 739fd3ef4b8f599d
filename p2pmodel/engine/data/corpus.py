"""A user's files as tokens, and the two parts of them: what is trained on, and what is held out."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ids import Digest
from p2pmodel.engine.data import rows
from p2pmodel.engine.data.encoding import Answer, encode_answers, encode_texts
from p2pmodel.engine.data.packing import Blocks, answer_blocks, text_blocks
from p2pmodel.engine.data.texts import file_size, read_text

MIN_TOKENS = 32
MAX_TOKENS = 1 << 27
SHOWN_LINES = 3
_TOGETHER = 256


@dataclass(frozen=True)
class Source:
    """A file that was read: `name` is the base name, `digest` and `size` are of its bytes; examples: used of it;
    skipped: lines left out because they are broken."""

    name: str
    digest: Digest
    size: int
    examples: int
    skipped: int


@dataclass
class Corpus:
    """texts: all texts end to end, with the end-of-text token around each if there is one. tokens: of all that was
    added."""

    sources: list[Source] = field(default_factory=list)
    texts: "array[int]" = field(default_factory=lambda: array("i"))
    answers: list[Answer] = field(default_factory=list)
    tokens: int = 0

    def add_text(self, ids: Sequence[int]) -> None:
        """Raises InvalidInput beyond MAX_TOKENS."""
        self.texts.extend(ids)
        self._count(len(ids))

    def add_answer(self, answer: Answer) -> None:
        """Raises InvalidInput beyond MAX_TOKENS."""
        self.answers.append(answer)
        self._count(len(answer.ids))

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        if self.tokens > MAX_TOKENS:
            raise InvalidInput(f"The data hold more than {MAX_TOKENS} tokens.", "Train on a part of them.")


@dataclass(frozen=True)
class Parts:
    """What is trained on, what the loss is measured on. No block and no example is in both."""

    train: Blocks
    held_out: Blocks


def load(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, skip_broken: bool = False) -> Corpus:
    """Reads JSON and Parquet by their suffixes, everything else as one plain text each.

    Raises InvalidInput that names the file, and of broken lines how many there are and the first ones, unless
    skip_broken leaves them out; for an empty set; beyond MAX_TOKENS.
    """
    if not paths:
        raise InvalidInput("No data files were given.", "Name at least one with --data.")
    corpus = Corpus()
    for path in paths:
        if path.suffix.lower() in rows.SUFFIXES:
            _load_rows(corpus, path, tokenizer, skip_broken)
        else:
            file = read_text(path)
            _add_texts(corpus, tokenizer, [file.text])
            corpus.sources.append(Source(file.name, file.digest, file.size, 1, 0))
    return corpus


def split(
    corpus: Corpus,
    *,
    sequence: int,
    seed: int,
    share: float = 0.1,
    packing: bool = True,
    validation: Corpus | None = None,
) -> Parts:
    """Holds out `share` of the texts' blocks and of the different answers, drawn by the seed, at least one of all; or
    all of `validation`, and then what is there is not trained on.

    Little text makes for shorter blocks, so that there are always two. Raises InvalidInput when there is too little.
    """
    if validation is not None:
        return _beside(corpus, validation, sequence, packing)
    train: list[Blocks] = []
    held_out: list[Blocks] = []
    generator = torch.Generator().manual_seed(seed)
    if corpus.texts:
        blocks = text_blocks(corpus.texts, _text_sequence(corpus, sequence, 2))
        order, count = _drawn(len(blocks), share, generator)
        train.append(blocks[order[count:]])
        held_out += [blocks[order[:count]]] if count else []
    if corpus.answers:
        distinct = list({answer.key: answer for answer in corpus.answers}.values())
        if len(distinct) < 2 and not corpus.texts:
            raise InvalidInput("There is one example only, so none can be held out.", "Give more of them.")
        order, count = _drawn(len(distinct), share, generator)
        kept_out = {distinct[i].key for i in order[:count].tolist()}
        train.append(answer_blocks([a for a in corpus.answers if a.key not in kept_out], sequence, packing))
        held_out += [answer_blocks([distinct[i] for i in order[:count].tolist()], sequence, packing)] if count else []
    if not held_out:
        raise InvalidInput("The data are too short to hold a part of them out.", "Give more.")
    return Parts(Blocks.join(train), Blocks.join(held_out))


def _beside(corpus: Corpus, validation: Corpus, sequence: int, packing: bool) -> Parts:
    known = {source.digest for source in validation.sources}
    for source in corpus.sources:
        if source.digest in known:
            raise InvalidInput(f"{source.name} is given to be trained on and to be held out.", "Name another file.")
    kept_out = {answer.key for answer in validation.answers}
    answers = [answer for answer in corpus.answers if answer.key not in kept_out]
    if not corpus.texts and not answers:
        raise InvalidInput("No examples are left to train on: all of them are held out.", "Give other ones.")
    parts: list[Blocks] = []
    for part, chosen in ((corpus, answers), (validation, validation.answers)):
        blocks: list[Blocks] = []
        if part.texts:
            blocks.append(text_blocks(part.texts, _text_sequence(part, sequence, 1)))
        if chosen:
            blocks.append(answer_blocks(chosen, sequence, packing))
        parts.append(Blocks.join(blocks))
    return Parts(*parts)


def _drawn(count: int, share: float, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """An order of `count` things, and how many of its first are held out; none of a single one."""
    order = torch.randperm(count, generator=generator)
    return order, min(count - 1, max(1, round(count * share)))


def _text_sequence(corpus: Corpus, sequence: int, blocks: int) -> int:
    if len(corpus.texts) < MIN_TOKENS + 1:
        raise InvalidInput(
            f"The texts hold {len(corpus.texts)} tokens, too few to train on.",
            f"Give more than {MIN_TOKENS} tokens, better some ten thousand.",
        )
    return min(sequence, (len(corpus.texts) - 1) // blocks)


def _load_rows(corpus: Corpus, path: Path, tokenizer: PreTrainedTokenizerBase, skip_broken: bool) -> None:
    hashed, noun = rows.new_hash(), rows.noun_of(path)
    found, examples = rows.read_rows(path, hashed), 0
    broken: list[tuple[int, str]] = []
    count = 0
    while batch := list(islice(found, _TOGETHER)):
        texts: list[str] = []
        for number, example in batch:
            try:
                if isinstance(example, str):
                    raise ValueError(example)
                if isinstance(example, rows.Text):
                    texts.append(example.text)
                else:
                    corpus.add_answer(encode_answers(tokenizer, example))
                examples += 1
            except ValueError as error:
                count += 1
                broken += [(number, str(error))] if len(broken) < SHOWN_LINES else []
        _add_texts(corpus, tokenizer, texts)
    if count and not skip_broken:
        lines = "; ".join(f"{noun} {number} {what}" for number, what in broken)
        more = f"; and {count - len(broken)} more" if count > len(broken) else ""
        raise InvalidInput(
            f"{path.name} has {count} broken {noun}{'s'[: count > 1]}: {lines}{more}.",
            "Mend them, or leave them out with --skip-broken.",
        )
    if not examples:
        raise InvalidInput(
            f"No examples are left of {path.name}" + (f": all {count} {noun}s are broken." if count else "."),
            "Name a file with examples in it.",
        )
    corpus.sources.append(Source(path.name, Digest(hashed.hexdigest()), file_size(path), examples, count))


def _add_texts(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    if not texts:
        return
    between = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if not corpus.texts:
        corpus.add_text(between)
    for ids in encode_texts(tokenizer, texts):
        corpus.add_text([*ids, *between])
