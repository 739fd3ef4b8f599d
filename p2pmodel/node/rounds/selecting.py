"""Which of a round's patches enter its merge. Whatever is wrong with a patch is a reason to leave it out, and stops
neither the others nor the proposer.

Patches are taken as they were first seen here, an order that no contributor chooses by trying ids. Each is examined
alone; one that enters drives out its copies, which are not examined any more. One that does not enter drives out
nobody: a copy of an honest patch that was scaled until it harms is left out for that, and the honest one stays.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from p2pmodel.domain import modular
from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import PatchId, short
from p2pmodel.domain.modular import Experts
from p2pmodel.domain.version import MAX_REASON, LeftOut
from p2pmodel.engine.exams.screening import Screened
from p2pmodel.logic.copies import copies
from p2pmodel.logic.pooling import pooled
from p2pmodel.node.lineages.intake import check_tensors
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.merging import Source, sketches, without_experts
from p2pmodel.node.lineages.states import new_experts, patch_change
from p2pmodel.tensors.changes import Change

State = Mapping[str, Tensor]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """entering: as they were first seen; left_out: all others; lengths: of the updates of those that are not experts,
    about; experts: of the version that comes of it."""

    entering: tuple[PatchId, ...]
    left_out: tuple[LeftOut, ...]
    lengths: Mapping[PatchId, float]
    experts: Experts

    def without(self, patches: Sequence[PatchId], reason: str) -> "Selection":
        """With these left out too, which bring no experts."""
        entering = tuple(patch for patch in self.entering if patch not in patches)
        added = tuple(LeftOut(patch, reason) for patch in patches)
        return Selection(entering, (*self.left_out, *added), self.lengths, self.experts)


@dataclass(frozen=True)
class Fit:
    """What some patches make of their parent. sources: sorted by id; values: by slot, at the scale `alpha`; gains:
    whether a maintainer would accept them by the tuning split."""

    sources: Sequence[Source]
    values: State
    alpha: float
    gains: bool


def fit(selection: Selection, fitted: Callable[[Sequence[PatchId]], Fit | None]) -> tuple[Selection, Fit] | None:
    """What becomes of a selection, and of which part of it. fitted: of some of its patches; None where they have no
    finite values together. None when there is nothing to propose.

    Patches that help alone may ruin a merge together: layers that one of them scales up and down in turn cancel out
    in that patch, and not in its mean with others. Such an update is long. So where the merge gains nothing, the
    longest are left out, as few as it takes, found by bisection.
    """
    whole = fitted(selection.entering)
    if whole and whole.gains:
        return selection, whole
    found = None if whole is None else (selection, whole)
    by_length = sorted((p for p in selection.entering if p in selection.lengths), key=selection.lengths.__getitem__)
    gaining, failing = 0, len(by_length)
    while failing - gaining > 1:
        middle = (gaining + failing) // 2
        part = selection.without(by_length[middle:], "the merge gains nothing with it")
        some = fitted(part.entering)
        if some and some.gains:
            gaining, found = middle, (part, some)
        else:
            failing = middle
    if gaining:
        log.warning("the merge gains with the %d shortest of %d updates only", gaining, len(by_length))
    return found


def select(
    lineage: Lineage,
    parent: State,
    patches: Sequence[PatchId],
    examine: Callable[[PatchId, State], Screened],
    go_on: Callable[[], None],
) -> Selection:
    """patches: on one version, the first seen first; parent: that version's values. examine: of a patch, at the
    parent's values with it alone. go_on: called before each; what it raises ends the selection."""
    return _Selecting(lineage, parent, examine, go_on).of(patches)


class _Selecting:
    def __init__(
        self, lineage: Lineage, parent: State, examine: Callable[[PatchId, State], Screened], go_on: Callable[[], None]
    ) -> None:
        self._lineage, self._parent, self._examine, self._go_on = lineage, parent, examine, go_on
        self._reasons: dict[PatchId, str] = {}
        self._known: dict[tuple[str, str], str] = {}

    def of(self, patches: Sequence[PatchId]) -> Selection:
        weighed = [patch for patch in patches if self._lineage.notes.weight_of(patch) != 0]
        self._reasons |= dict.fromkeys(set(patches) - set(weighed), "its proposer gives it no weight")
        comparable = without_experts(self._lineage, weighed)
        found = sketches(self._parent, self._read(comparable if len(comparable) > 1 else ()))
        readable = [patch for patch in weighed if patch not in self._reasons]
        for copy, original in copies(readable, found.cosines, self._enters).items():
            self._reasons[copy] = f"it is a copy of patch {short(original)}"
        entering = [patch for patch in weighed if patch not in self._reasons]
        before = self._lineage.experts(self._lineage.patches[patches[0]].parent) if patches else ()
        pool = pooled(before, [(patch, self._brought(patch)) for patch in entering])
        left_out = [LeftOut(patch, reason[:MAX_REASON]) for patch, reason in self._reasons.items()]
        left_out += pool.left_out
        out = {entry.patch for entry in left_out}
        return Selection(tuple(p for p in entering if p not in out), tuple(left_out), found.lengths, pool.experts)

    def _read(self, patches: Sequence[PatchId]) -> Iterator[tuple[PatchId, Change]]:
        for patch in patches:
            self._go_on()
            try:
                yield patch, patch_change(self._lineage, self._lineage.patches[patch])
            except Rejected as error:
                self._leave_out(patch, error)

    def _enters(self, patch: PatchId) -> bool:
        self._go_on()
        header = self._lineage.patches[patch]
        objects, limit = self._lineage.home.objects, self._lineage.largest_patch
        # Who publishes the same values under a hundred names gets one examination.
        values = header.kind, header.adapter.digest
        try:
            check_tensors(self._lineage, header, *(objects.load(ref.digest, limit) for ref in header.blobs))
            if values not in self._known:
                self._known[values] = self._screen(patch)
        except Rejected as error:
            self._leave_out(patch, error)
            return False
        if reason := self._known[values]:
            self._reasons[patch] = reason
        return not reason

    def _screen(self, patch: PatchId) -> str:
        """The reason for leaving the patch out; empty when it enters. Raises Rejected."""
        began = time.monotonic()
        alone = patch_change(self._lineage, self._lineage.patches[patch]).applied_to(self._parent)
        screened = self._examine(patch, alone)
        cost = f"{screened.cases} of {screened.total} cases in {time.monotonic() - began:.1f} s"
        log.info("patch %s %s (%s)", short(patch), screened.reason or "enters the merge", cost)
        return screened.reason

    def _brought(self, patch: PatchId) -> Experts:
        """The experts that the patch adds to its parent's."""
        header = self._lineage.patches[patch]
        if header.kind != modular.KIND:
            return ()
        return new_experts(self._lineage, header, patch_change(self._lineage, header))

    def _leave_out(self, patch: PatchId, error: Rejected) -> None:
        log.warning("patch %s is left out: %s", short(patch), error.message)
        self._reasons[patch] = error.message
