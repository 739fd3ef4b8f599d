"""`[[answer]]`: exact match. The greedy answer, up to `stop` and without blanks around it, has to be one of the row's;
the score is the share of wrong ones. Settings: tokens (32), stop ("\\n").

    {"prompt": "2 + 2 =", "answers": ["4", "four"]}
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.engine.exams.bench import Bench
from p2pmodel.engine.exams.rows import MAX_ANSWER_TOKENS, Entry, Files, Split, read_rows
from p2pmodel.engine.exams.sections import Measured, Questions, failures


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prompt: str
    answers: tuple[str, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if not self.answers or not all(answer.strip() for answer in self.answers):
            raise ValueError("a question has one right answer at least, and none is empty")


@dataclass(frozen=True)
class Answers(Questions[Answer]):
    tokens: int = 32
    stop: str = "\n"
    strict: bool = False

    @classmethod
    def load(cls, entry: Entry, files: Files) -> "Answers":
        entry.demand_known("tokens", "stop")
        stop = entry.settings.get("stop", "\n")
        if not isinstance(stop, str) or len(stop) > 64:
            raise InvalidInput(f"stop of answer {entry.name} is no text of at most 64 characters.")
        tune, test = (read_rows(name, files, Answer) for name in (entry.tune, entry.test))
        tokens = entry.whole("tokens", 32, MAX_ANSWER_TOKENS)
        return cls(f"answer/{entry.name}", entry.tolerance, tune, test, tokens, stop)

    def measure(self, bench: Bench, split: Split, cases: Sequence[int]) -> Measured:
        return failures([self._fails(bench, self.cases(split)[case]) for case in cases])

    def _fails(self, bench: Bench, row: Answer) -> bool:
        said = bench.answer(row.prompt, self.tokens, self.stop).strip()
        return said not in {answer.strip() for answer in row.answers}
