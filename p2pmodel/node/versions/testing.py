"""A patch or a version against its parent on a suite: the lineage's exam, or one of the user's own."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from p2pmodel.domain.errors import NotFound, Rejected
from p2pmodel.domain.ids import VersionId, short
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole
from p2pmodel.engine.exams import Examiner, Suite
from p2pmodel.engine.harness import Harness
from p2pmodel.logic.judgement import is_share, regressions, tolerance
from p2pmodel.node.lineages.bases import find_base
from p2pmodel.node.lineages.discovery import local_lineage
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import patch_file_state, patch_state, version_state
from p2pmodel.node.patches.patchbook import read_patch
from p2pmodel.store.home import Home
from p2pmodel.tensors.kinds import Kinds


@dataclass(frozen=True)
class SectionResult:
    """Lower scores are better: nats per byte of a domain, else the share of failed cases. change: relative for a
    domain, a difference for a share. regression: a sentence when it is worse than the parent's beyond `tolerance`."""

    section: str
    cases: int
    parent: float
    score: float
    change: float
    tolerance: float
    regression: str


@dataclass(frozen=True)
class SuiteReport:
    """seconds: what examining it cost, its parent not counted."""

    what: str
    parent: str
    suite: str
    digest: str
    is_the_lineages: bool
    sections: tuple[SectionResult, ...]
    cases: int
    seconds: float

    @property
    def regressions(self) -> list[str]:
        return [result.regression for result in self.sections if result.regression]


def run_suite(
    home: Path | None, model: str | None, base: Path | None, subject: str, folder: Path | None
) -> SuiteReport:
    """subject: a patch file, or the id of a patch, or a version, as `Lineage.find_version` takes it; folder: of the
    suite, None for the lineage's own exam. The deciding part of the suite is what is run.

    Raises NotFound, InvalidInput for a suite that can't be used, Rejected("digest") for a folder that has the name of
    the lineage's exam and is another.
    """
    opened = Home.open(home)
    lineage = local_lineage(opened, model)
    suite = chosen_suite(lineage, folder)
    what, state, parent = _subject(home, lineage, subject)
    path = find_base(opened, lineage, base)
    examiner = Examiner(load_whole(path), load_tokenizer(path), Kinds(lineage.manifest.kinds), suite)
    before = examiner.score(version_state(lineage, parent), "test")
    began = time.monotonic()
    measured = examiner.measure(state, "test")
    seconds = time.monotonic() - began
    now = {name: section.score for name, section in measured.items()}
    limits, rules = lineage.manifest.limits, suite.rules
    results = []
    for name, section in measured.items():
        worse = regressions({name: before[name]}, {name: now[name]}, limits, rules)
        difference = now[name] - before[name]
        change = difference if is_share(name) else difference / before[name]
        allowed = tolerance(name, limits, rules)
        cases = len(section.amounts)
        results.append(SectionResult(name, cases, before[name], now[name], change, allowed, "; ".join(worse)))
    return SuiteReport(
        what,
        f"{lineage.manifest.name} {lineage.number(parent)}",
        suite.name,
        suite.digest,
        suite.digest == lineage.manifest.exam.digest,
        tuple(results),
        sum(result.cases for result in results),
        seconds,
    )


@dataclass(frozen=True)
class TaskResult:
    """A metric of a task of lm-evaluation-harness. change: of the score, a difference; regression: a sentence when it
    is worse than the parent's by more than `tolerance`."""

    task: str
    metric: str
    cases: int
    parent: float
    score: float
    change: float
    tolerance: float
    regression: str


@dataclass(frozen=True)
class TaskReport:
    """seconds: what running the tasks cost, its parent not counted."""

    what: str
    parent: str
    folder: str
    results: tuple[TaskResult, ...]
    seconds: float

    @property
    def regressions(self) -> list[str]:
        return [result.regression for result in self.results if result.regression]


def run_tasks(
    home: Path | None,
    model: str | None,
    base: Path | None,
    subject: str,
    folder: Path,
    names: Sequence[str],
    limit: int | None,
    tolerance: float,
) -> TaskReport:
    """subject: as for `run_suite`; folder, names, limit: see `engine.harness.Harness`. tolerance: how much worse a
    score may be, absolute. Raises NotFound, InvalidInput."""
    harness = Harness(folder, names, limit)
    opened = Home.open(home)
    lineage = local_lineage(opened, model)
    what, state, parent = _subject(home, lineage, subject)
    path = find_base(opened, lineage, base)
    whole, tokenizer, kinds = load_whole(path), load_tokenizer(path), Kinds(lineage.manifest.kinds)
    before = {(s.task, s.metric): s for s in harness.run(whole, tokenizer, kinds, version_state(lineage, parent))}
    began = time.monotonic()
    after = harness.run(whole, tokenizer, kinds, state)
    seconds = time.monotonic() - began
    results = []
    for score in after:
        old = before[score.task, score.metric].score
        change = score.score - old
        worse = -change if score.higher_is_better else change
        sentence = f"{score.task}/{score.metric} is {score.score:.4f}, was {old:.4f}" if worse > tolerance else ""
        results.append(TaskResult(score.task, score.metric, score.cases, old, score.score, change, tolerance, sentence))
    number = lineage.number(parent)
    return TaskReport(what, f"{lineage.manifest.name} {number}", folder.name, tuple(results), seconds)


def chosen_suite(lineage: Lineage, folder: Path | None) -> Suite:
    """The suite in the folder, or the lineage's own. A folder that says that it is the lineage's has to be it. Raises
    NotFound, InvalidInput, Rejected("digest")."""
    exam = lineage.manifest.exam
    if folder is None:
        if not lineage.home.objects.has(exam.digest):
            raise NotFound(
                f"The exam of {lineage.manifest.name} is not on this machine yet.",
                "A node of this home fetches it (p2pmodel join); or name a folder with --suite.",
            )
        return Suite.unpack(lineage.home.objects.load(exam.digest, exam.size), exam.size)
    suite = Suite.load(folder)
    if suite.digest != exam.digest and suite.name and suite.name == _name_of_exam(lineage):
        raise Rejected(
            "digest",
            f"The exam in {folder} calls itself {suite.name!r} like that of {lineage.manifest.name}, but its digest is "
            f"{short(suite.digest)}, and the Manifest's is {short(exam.digest)}.",
            "Restore the folder, leave --suite out, or give a suite of your own another name.",
        )
    return suite


def _name_of_exam(lineage: Lineage) -> str:
    """Empty when the exam is not here."""
    exam = lineage.manifest.exam
    if not lineage.home.objects.has(exam.digest):
        return ""
    return Suite.unpack(lineage.home.objects.load(exam.digest, exam.size), exam.size).name


def _subject(home: Path | None, lineage: Lineage, text: str) -> tuple[str, dict[str, Tensor], VersionId]:
    """What it is called, its state, and its parent; the base is its own."""
    name = lineage.manifest.name
    if not Path(text).is_file():
        try:
            version = lineage.find_version(text)
        except NotFound:
            pass
        else:
            parent = version if version == lineage.model else lineage.version(version).candidate.parent
            return f"{name} {lineage.number(version)}", version_state(lineage, version), parent
    entry = read_patch(home, text)
    if entry.patch.model != lineage.model:
        raise NotFound(
            f"Patch {short(entry.id)} is for {entry.model_name}, not for {name}.", "Name its model with --model."
        )
    state = patch_file_state(lineage, Path(text)) if Path(text).is_file() else patch_state(lineage, entry.patch)
    return f"{name} {entry.parent_number} with patch {short(entry.id)}", state, entry.patch.parent
