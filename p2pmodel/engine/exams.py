"""Exams: a lineage's suite of held-out texts, by domain, and the scores of a state on them.

A suite is a folder:

    exam.toml            name, licence, and for each [[domain]] name, tune and test
    DOMAIN.tune.jsonl    one text a line, {"source": "…", "text": "…"}: for choices such as α
    DOMAIN.test.jsonl    for decisions

It travels as one archive, the canonical encoding of {file name: bytes}. Scores are nats per byte, so that they do not
depend on the tokenizer's idea of a token.
"""

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import msgspec
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from p2pmodel.domain.errors import InvalidInput, Rejected
from p2pmodel.engine.evaluation import Scorer, attached
from p2pmodel.tensors.kinds import PatchKind
from p2pmodel.wire import canonical

Split = Literal["tune", "test"]
INDEX = "exam.toml"
MAX_DOMAINS = 64
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
ALPHA_STEP = 1 / 16


class _Row(msgspec.Struct):
    text: str
    source: str = ""


@dataclass(frozen=True)
class Domain:
    name: str
    tune: tuple[str, ...]
    test: tuple[str, ...]

    def texts(self, split: Split) -> tuple[str, ...]:
        return self.tune if split == "tune" else self.test


class Suite:
    """`domains`, in the order of exam.toml; `name` and `licence` as it says."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """From the contents of its files, by name. Raises InvalidInput."""
        index = _index(files)
        self.name, self.licence = str(index.get("name", "")), str(index.get("licence", ""))
        entries = index.get("domain")
        if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_DOMAINS:
            raise InvalidInput(
                f"{INDEX} has to name 1 to {MAX_DOMAINS} domains.", "Add a [[domain]] with name, tune and test."
            )
        self.domains = tuple(_domain(entry, files) for entry in entries)
        if len({domain.name for domain in self.domains}) != len(self.domains):
            raise InvalidInput(f"{INDEX} names a domain twice.")
        used = {INDEX} | {entry[split] for entry in entries for split in get_args(Split)}
        self._files = {name: bytes(files[name]) for name in sorted(used)}

    @classmethod
    def load(cls, folder: Path) -> "Suite":
        """Raises InvalidInput, in one sentence, for what is missing or wrong."""
        if not (folder / INDEX).is_file():
            raise InvalidInput(f"{folder} holds no {INDEX}.", "Name the folder of an exam.")
        return cls(_Folder(folder))

    def pack(self) -> bytes:
        """The canonical archive of the files that exam.toml names, and of itself."""
        return canonical.encode(self._files)

    @classmethod
    def unpack(cls, raw: bytes, limit: int) -> "Suite":
        """Of an archive that nobody vouches for. Raises Rejected("size" | "schema" | "canonical")."""
        try:
            return cls(canonical.decode(raw, dict[str, bytes], limit))
        except InvalidInput as error:
            raise Rejected("schema", f"The exam cannot be used. {error.message}") from None


class Examiner:
    """Scores states of one model. The texts are encoded once; `score` depends on its arguments alone."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: PatchKind, suite: Suite
    ) -> None:
        self._model, self._tokenizer, self._kind, self._suite = model, tokenizer, kind, suite
        self._scorers: dict[Split, Scorer] = {}

    def score(self, state: Mapping[str, Tensor], split: Split) -> dict[str, float]:
        """Nats per byte by domain. Raises Rejected("finite") when the model's answers are not numbers."""
        domains = self._suite.domains
        texts = [text for domain in domains for text in domain.texts(split)]
        if split not in self._scorers:
            self._scorers[split] = Scorer(self._model, self._tokenizer, texts)
        with attached(self._model, self._kind, state) as applier:
            nats = iter(self._scorers[split].nats(applier, state))
        scores = {d.name: sum(next(nats) for _ in d.texts(split)) / _size(d.texts(split)) for d in domains}
        if not all(0 <= score < float("inf") for score in scores.values()):
            raise Rejected("finite", "The model's loss on the exam is not finite.")
        return scores


def search_alpha(score: Callable[[float], float], highest: float = 4.0) -> float:
    """The scale with the lowest score, a multiple of 1/16 in (0, highest]; four to six evaluations, none twice.

    The score is close to a parabola in α: three points that enclose the lowest, then the vertex through them.
    """
    seen: dict[float, float] = {}

    def at(alpha: float) -> float:
        if alpha not in seen:
            seen[alpha] = score(alpha)
        return seen[alpha]

    for alpha in (0.5, 1.0, 2.0):
        at(alpha)
    best = min(seen, key=lambda alpha: (at(alpha), alpha))
    while best == max(seen) and best < highest:
        at(min(2 * best, highest))
        best = min(seen, key=lambda alpha: (at(alpha), alpha))
    if best == min(seen):
        at(best / 2)
        best = min(seen, key=lambda alpha: (at(alpha), alpha))
    points = sorted(seen)
    middle = min(max(points.index(best), 1), len(points) - 2)
    vertex = _vertex(*((alpha, at(alpha)) for alpha in points[middle - 1 : middle + 2]))
    if vertex is not None:
        at(min(max(round(vertex / ALPHA_STEP) * ALPHA_STEP, ALPHA_STEP), highest))
    return min(seen, key=lambda alpha: (at(alpha), alpha))


def _vertex(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float | None:
    """Where the parabola through three points is lowest; None when it opens downwards."""
    left, right = (b[1] - a[1]) / (b[0] - a[0]), (c[1] - b[1]) / (c[0] - b[0])
    curvature = (right - left) / (c[0] - a[0])
    return None if not curvature > 0 else (a[0] + b[0]) / 2 - left / (2 * curvature)


class _Folder(Mapping[str, bytes]):
    """The plain files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> bytes:
        path = self._folder / name
        if path.is_symlink() or not path.is_file():
            raise KeyError(name)
        try:
            return path.read_bytes()
        except OSError as error:
            raise InvalidInput(f"{name} of the exam cannot be read: {error.strerror or error}.") from None

    def __iter__(self) -> Iterator[str]:
        return (path.name for path in self._folder.iterdir())

    def __len__(self) -> int:
        return sum(1 for _ in self._folder.iterdir())


def _index(files: Mapping[str, bytes]) -> dict[str, object]:
    if INDEX not in files:
        raise InvalidInput(f"The exam has no {INDEX}.")
    try:
        return tomllib.loads(files[INDEX].decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidInput(f"{INDEX} is not valid TOML: {error}.") from None


def _domain(entry: object, files: Mapping[str, bytes]) -> Domain:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "tune", "test")):
        raise InvalidInput(f"A domain in {INDEX} lacks its name, tune or test.", "Each [[domain]] needs all three.")
    if not _NAME.fullmatch(entry["name"]):
        raise InvalidInput(f"{entry['name'][:64]!r} is no name for a domain.", "Use letters, digits, '-', '_' and '.'.")
    return Domain(entry["name"], _texts(entry["tune"], files), _texts(entry["test"], files))


def _texts(name: str, files: Mapping[str, bytes]) -> tuple[str, ...]:
    if not _NAME.fullmatch(name) or not name.endswith(".jsonl"):
        raise InvalidInput(
            f"{name[:64]!r} is no plain file name that ends in .jsonl.", "An exam's files lie side by side."
        )
    if name not in files:
        raise InvalidInput(f"{name} is named in {INDEX}, but is not there.")
    texts = []
    for number, line in enumerate(files[name].split(b"\n"), 1):
        if line.strip():
            try:
                texts.append(msgspec.json.decode(line, type=_Row).text)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise InvalidInput(f"Line {number} of {name} is not a row with a text: {error}.") from None
    if not any(texts):
        raise InvalidInput(f"{name} holds no text.")
    return tuple(texts)


def _size(texts: tuple[str, ...]) -> int:
    return sum(len(text.encode()) for text in texts)
