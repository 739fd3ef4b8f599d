"""`[[regression]]`: what the model must still say, and must not say, in its greedy answer; the score is the share of
cases that fail. By itself it tolerates none more than the parent's. Settings: tokens (32).

    {"prompt": "import ", "must": ["os"], "must_not": ["eval("]}
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from p2pmodel.engine.exams.bench import Bench
from p2pmodel.engine.exams.rows import MAX_ANSWER_TOKENS, Entry, Files, Split, read_rows
from p2pmodel.engine.exams.sections import Measured, Questions, failures


class Regression(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prompt: str
    must: tuple[str, ...] = ()
    must_not: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        if (not self.must and not self.must_not) or not all((*self.must, *self.must_not)):
            raise ValueError("a case says what the answer must or must_not hold, and none of it is empty")


@dataclass(frozen=True)
class Regressions(Questions[Regression]):
    tokens: int = 32
    strict: bool = True

    @classmethod
    def load(cls, entry: Entry, files: Files) -> "Regressions":
        entry.demand_known("tokens")
        tune, test = (read_rows(name, files, Regression) for name in (entry.tune, entry.test))
        tokens = entry.whole("tokens", 32, MAX_ANSWER_TOKENS)
        return cls(f"regression/{entry.name}", entry.tolerance or 0.0, tune, test, tokens)

    def measure(self, bench: Bench, split: Split, cases: Sequence[int]) -> Measured:
        return failures([self._fails(bench, self.cases(split)[case]) for case in cases])

    def _fails(self, bench: Bench, row: Regression) -> bool:
        said = bench.answer(row.prompt, self.tokens)
        return not all(text in said for text in row.must) or any(text in said for text in row.must_not)
