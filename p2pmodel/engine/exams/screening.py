"""Examining a patch on as few cases as it takes: on some of them first, on all of them when those decide nothing."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.engine.exams.examiner import Examiner
from p2pmodel.engine.exams.rows import Split
from p2pmodel.engine.exams.sections import Measured
from p2pmodel.logic.judgement import NO_NUMBER, Finding, Screening, harm, why_leave_out

FIRST_CASES = 8
"""Of each section; twice as many each time after that."""


@dataclass(frozen=True)
class Screened:
    """reason: for leaving the patch out, empty when it enters; cases: how many of `total` were tried; scores: by
    section, of those cases; none where they are no numbers."""

    reason: str
    cases: int
    total: int
    scores: Mapping[str, float] = field(default_factory=dict)


def screen(
    examiner: Examiner, state: Mapping[str, Tensor], parent: Mapping[str, Measured], split: Split, seed: str
) -> Screened:
    """state: the parent's with the patch alone; parent: all of its cases, as `Examiner.measure` gave them; seed: what
    the order of the cases is drawn by, which whoever made the patch must not be able to foresee."""
    rules = examiner.suite.rules
    order = {name: _drawn(name, len(measured.amounts), seed) for name, measured in parent.items()}
    open_ended = {name: measured.amounts for name, measured in parent.items() if not rules[name].strict}
    screening = Screening(open_ended)
    seen: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in parent}
    total = sum(len(cases) for cases in order.values())

    def look(wanted: Mapping[str, Sequence[int]]) -> bool:
        """Tries these cases; False when the losses are no numbers."""
        cases_by_name = {name: cases for name, cases in wanted.items() if cases}
        try:
            measured = examiner.measure(state, split, cases_by_name) if cases_by_name else {}
        except Rejected as error:
            if error.reason != "finite":
                raise
            return False
        for name, cases in cases_by_name.items():
            for place, case in enumerate(cases):
                amount = measured[name].amounts[place]
                seen[name][case] = amount, measured[name].weights[place]
                if name in open_ended:
                    screening.see(name, case, amount)
        return True

    def tried() -> int:
        return sum(len(cases) for cases in seen.values())

    wanted = {name: cases[:FIRST_CASES] if name in open_ended else cases for name, cases in order.items()}
    while any(wanted.values()):
        if not look(wanted):
            return Screened(NO_NUMBER, tried() + sum(len(cases) for cases in wanted.values()), total)
        scores = {name: _score(cases) for name, cases in seen.items()}
        strict = {name: parent[name].score for name in parent if name not in open_ended}
        if reason := harm(strict, {name: scores[name] for name in strict}, rules):
            return Screened(reason, tried(), total, scores)
        if screening.finding is not Finding.OPEN:
            return Screened(screening.reason, tried(), total, scores)
        wanted = {
            name: order[name][len(seen[name]) : 2 * len(seen[name])] if screening.needs(name) else []
            for name in open_ended
        }
    if not look({name: [case for case in order[name] if case not in seen[name]] for name in parent}):
        return Screened(NO_NUMBER, total, total)
    scores = {name: _score(cases) for name, cases in seen.items()}
    before = {name: measured.score for name, measured in parent.items()}
    return Screened(why_leave_out(before, scores, rules), total, total, scores)


def _drawn(section: str, count: int, seed: str) -> list[int]:
    """An order of the cases that depends on section and seed alone."""
    return sorted(range(count), key=lambda case: hashlib.sha256(f"{seed}/{section}/{case}".encode()).digest())


def _score(cases: Mapping[int, tuple[float, float]]) -> float:
    amounts, weights = ([pair[side] for _, pair in sorted(cases.items())] for side in (0, 1))
    return sum(amounts) / sum(weights)
