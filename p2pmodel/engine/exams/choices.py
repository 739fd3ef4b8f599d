"""`[[choice]]`: multiple choice. The model takes the choice with the least nats per byte after the prompt
(log-likelihood normalised by length); the score is the share of wrong ones.

    {"prompt": "The capital of France is", "choices": [" Paris", " Lyon"], "answer": 0}
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from p2pmodel.engine.evaluation import Continuation
from p2pmodel.engine.exams.bench import Bench
from p2pmodel.engine.exams.rows import Entry, Files, Split, read_rows
from p2pmodel.engine.exams.sections import Measured, Questions, failures

MAX_CHOICES = 26


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prompt: str
    choices: tuple[str, ...]
    answer: int
    source: str = ""

    def __post_init__(self) -> None:
        if not 2 <= len(self.choices) <= MAX_CHOICES or not all(self.choices):
            raise ValueError(f"a question has 2 to {MAX_CHOICES} choices, none of them empty")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError("`answer` is the number of the right choice, from 0")


@dataclass(frozen=True)
class Choices(Questions[Choice]):
    strict: bool = False

    @classmethod
    def load(cls, entry: Entry, files: Files) -> "Choices":
        entry.demand_known()
        tune, test = (read_rows(name, files, Choice) for name in (entry.tune, entry.test))
        return cls(f"choice/{entry.name}", entry.tolerance, tune, test)

    def measure(self, bench: Bench, split: Split, cases: Sequence[int]) -> Measured:
        rows = [self.cases(split)[case] for case in cases]
        nats = iter(bench.nats([Continuation(row.prompt, choice) for row in rows for choice in row.choices]))
        return failures([_taken(row, [next(nats) for _ in row.choices]) != row.answer for row in rows])


def _taken(row: Choice, nats: Sequence[float]) -> int:
    """Of equally likely choices the first."""
    each = [value / len(choice.encode()) for value, choice in zip(nats, row.choices, strict=True)]
    return each.index(min(each))
