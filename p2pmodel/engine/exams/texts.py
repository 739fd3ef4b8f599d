"""`[[domain]]`: held-out texts of one domain, scored in nats per byte, so that it does not depend on the tokenizer.

{"text": "…", "source": "where it is from"}
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.engine.evaluation import Continuation
from p2pmodel.engine.exams.bench import Bench
from p2pmodel.engine.exams.rows import Entry, Files, Split, read_rows
from p2pmodel.engine.exams.sections import Measured


class _Row(msgspec.Struct):
    text: str
    source: str = ""


@dataclass(frozen=True)
class Domain:
    name: str
    tune: tuple[str, ...]
    test: tuple[str, ...]
    tolerance: float | None = None
    strict: bool = False

    @classmethod
    def load(cls, entry: Entry, files: Files) -> "Domain":
        return cls(entry.name, _texts(entry.tune, files), _texts(entry.test, files), entry.tolerance)

    def texts(self, split: Split) -> tuple[str, ...]:
        return self.tune if split == "tune" else self.test

    def count(self, split: Split) -> int:
        return len(self.texts(split))

    def weights(self, split: Split) -> tuple[float, ...]:
        return tuple(float(len(text.encode())) for text in self.texts(split))

    def references(self, split: Split) -> Sequence[Continuation]:
        return ()

    def measure(self, bench: Bench, split: Split, cases: Sequence[int]) -> Measured:
        texts, weights = self.texts(split), self.weights(split)
        nats = bench.nats([texts[case] for case in cases])
        return Measured(tuple(nats), tuple(weights[case] for case in cases))


def _texts(name: str, files: Files) -> tuple[str, ...]:
    texts = tuple(row.text for row in read_rows(name, files, _Row))
    if not any(texts):
        raise InvalidInput(f"{name} holds no text.")
    return texts
