"""A maintainer's work: examine patches, merge them, propose a candidate; recompute others' candidates, sign a verdict.

All of it blocks for seconds to minutes and belongs on a thread of its own. What decides is in `p2pmodel.logic`; the
mathematics is in `p2pmodel.tensors`.
"""

import hashlib
import hmac
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from p2pmodel.domain.errors import NotRunning, Rejected
from p2pmodel.domain.ids import PatchId, PeerId, VersionId, short
from p2pmodel.domain.model import BlobRef, MergeSpec
from p2pmodel.domain.modular import KIND, Experts, slots_at
from p2pmodel.domain.version import Candidate, DomainScore, Verdict
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole
from p2pmodel.engine.exams import Examiner, Suite, search_alpha
from p2pmodel.engine.exams.screening import Screened, screen
from p2pmodel.logic.judgement import mean, objective, why_reject
from p2pmodel.logic.pooling import pooled
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.merging import Merged, Source, copied_among, mean_control, merge, stored
from p2pmodel.node.lineages.states import new_experts, patch_change, version_state
from p2pmodel.node.rounds.selecting import Fit, fit, select
from p2pmodel.tensors import blob
from p2pmodel.tensors.experts import without_experts
from p2pmodel.tensors.kinds import Kinds
from p2pmodel.tensors.merging import check, get_strategy
from p2pmodel.wire import canonical

State = Mapping[str, Tensor]
Scores = dict[str, float]
log = logging.getLogger(__name__)

PLAIN_MEAN = MergeSpec("mean@1")


@dataclass(frozen=True)
class Proposal:
    """blobs: those of the candidate, in their order."""

    candidate: Candidate
    blobs: tuple[bytes, ...]


class Maintainer:
    def __init__(
        self,
        lineage: Lineage,
        me: PeerId,
        base: Path,
        observe_merge: Callable[[float], None],
        observe_refusal: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """base: folder of the whole checkpoint. observe_merge is told the seconds of every merge, observe_refusal in a
        word what is wrong with every candidate that is refused before its exam. Raises NotFound, Rejected when this
        node cannot merge as the Manifest says."""
        check(lineage.manifest.merge)
        self.lineage, self.me, self._observe_merge, self._observe_refusal = lineage, me, observe_merge, observe_refusal
        self._kind = Kinds(lineage.manifest.kinds)
        self._model, self._tokenizer = load_whole(base), load_tokenizer(base)
        self._exam = lineage.manifest.exam
        self._examiner = self._examiner_of(self._exam)
        self._secret = lineage.home.key.derive("screening").to_libp2p()
        self._scores: dict[tuple[str, str], Scores] = {}
        self._stopped = threading.Event()
        self.examined = 0
        """Patches, since whoever has them proposed set it to 0."""

    def stop(self) -> None:
        """Work under way on another thread ends within one exam, with NotRunning."""
        self._stopped.set()

    def propose(
        self, round: int, parent: VersionId, patches: tuple[PatchId, ...], wanted: Callable[[], bool] = lambda: True
    ) -> Proposal | None:
        """Examines the patches one by one on the tuning split, merges those that help, and finds α there. None when
        nothing is left to merge. wanted: asked before each step, on this thread; raises NotRunning when it says no."""
        lineage, manifest = self.lineage, self.lineage.manifest

        def go_on() -> None:
            self._demand_running()
            if not wanted():
                raise NotRunning("The candidate is not wanted any more.")

        go_on()
        self._follow_exam()
        before = version_state(lineage, parent)
        measured = self._examiner.measure(before, "tune")

        def examine(patch: PatchId, alone: State) -> Screened:
            screened = screen(self._examiner, alone, measured, "tune", self._seed(round, patch))
            self.examined += 1
            return screened

        given = set(patches)
        seen = [patch for patch in tuple(lineage.patches) if patch in given]
        selection = select(lineage, before, seen, examine, go_on)
        tuning = {name: section.score for name, section in measured.items()}
        fitted = fit(selection, partial(self._fit, parent, before, tuning, go_on)) if selection.entering else None
        if fitted is None:
            for entry in selection.left_out:
                log.warning("patch %s can't be merged: %s", short(entry.patch), entry.reason)
            return None
        selection, found = fitted
        result, control = blob.pack(found.values), mean_control(lineage, found.sources)
        candidate = Candidate(
            model=lineage.model,
            round=round,
            parent=parent,
            number=lineage.number(parent).after(lineage.experts(parent), selection.experts),
            patches=tuple(source.id for source in found.sources),
            left_out=tuple(sorted(selection.left_out, key=lambda x: x.patch)),
            merge=manifest.merge,
            alpha=found.alpha,
            result=canonical.blob_ref(result),
            weights=() if all(x.weight == 1 for x in found.sources) else tuple(x.weight for x in found.sources),
            control=None if control is None else canonical.blob_ref(control),
            experts=selection.experts,
        )
        return Proposal(candidate, (result,) if control is None else (result, control))

    def _fit(
        self, parent: VersionId, before: State, tuning: Scores, go_on: Callable[[], None], patches: Sequence[PatchId]
    ) -> Fit | None:
        """The patches merged at the best scale for the tuning split; None where no scale gives finite values. tuning:
        the parent's scores there."""
        lineage, limits, rules = self.lineage, self.lineage.manifest.limits, self._examiner.suite.rules
        sources = [stored(lineage, patch, lineage.notes.weight_of(patch)) for patch in sorted(patches)]
        unit = get_strategy(lineage.manifest.merge.strategy).unit(len(sources))
        try:
            merged = self._merge(parent, before, sources, lineage.manifest.merge)

            def score(alpha: float) -> float:
                go_on()
                return objective(tuning, self._score(merged.at(unit * alpha), "tune"), limits, rules)

            alpha = unit * search_alpha(score)
        except Rejected as error:
            if error.reason != "finite":
                raise
            return None
        values = merged.at(alpha)
        return Fit(sources, values, alpha, not why_reject(tuning, self._score(values, "tune"), limits, rules))

    def _seed(self, round: int, patch: PatchId) -> str:
        """What no contributor can foresee, and this maintainer finds again: who could choose on which cases a patch is
        tried first would choose kind ones."""
        return hmac.new(self._secret, f"{round}/{patch}".encode(), hashlib.sha256).hexdigest()

    def examine(self, version: VersionId) -> Verdict:
        """Recomputes the merge and examines the result on the deciding split."""
        candidate = self.lineage.candidates[version]
        self._follow_exam()
        try:
            scores = self._examine(candidate)
        except Rejected as error:
            self._observe_refusal(error.reason)
            return self._verdict(candidate, version, error.message, ())
        if candidate.amends:
            # Its values are its parent's; whether it is wanted is for people to say.
            return self._verdict(candidate, version, "", ())
        if candidate.removes:
            # Taking something away costs its domain: people decide on that too.
            return self._verdict(candidate, version, "", scores)
        if candidate.restores:
            # Who goes back knows something that the exam does not: people decide, not scores.
            agreed = self.lineage.agrees_to(candidate)
            return self._verdict(
                candidate, version, "" if agreed else "its maintainer did not agree to go back", scores
            )
        parent, new = ({s.domain: getattr(s, name) for s in scores} for name in ("parent", "candidate"))
        return self._verdict(
            candidate,
            version,
            why_reject(parent, new, self.lineage.manifest.limits, self._examiner.suite.rules),
            scores,
        )

    def _examine(self, candidate: Candidate) -> tuple[DomainScore, ...]:
        lineage, manifest = self.lineage, self.lineage.manifest
        if flaw := candidate.misfit(lineage.number(candidate.parent), lineage.experts(candidate.parent)):
            raise Rejected("chain", f"The candidate {flaw}.")
        if candidate.amendment is not None:
            self._examiner_of(candidate.amendment.exam)
            return ()
        before = version_state(lineage, candidate.parent)
        if candidate.restores:
            limit = candidate.result.size
            slots = slots_at(manifest.slots, candidate.experts)
            old = blob.unpack(lineage.home.objects.load(candidate.result.digest, limit), slots, limit)
            return self._scores_of(before, old)
        if candidate.removes:
            left = without_experts(before, candidate.experts)
            if canonical.blob_ref(blob.pack(left)) != candidate.result:
                raise Rejected("digest", "The candidate has other values than its parent without the experts.")
            return self._scores_of(before, left)
        if candidate.merge != manifest.merge:
            raise Rejected("chain", "The candidate was not merged as the Manifest says.")
        pool = pooled(lineage.experts(candidate.parent), [(p, self._brought(p)) for p in candidate.patches])
        if pool.left_out or pool.experts != candidate.experts:
            raise Rejected("chain", "The candidate has other experts than its parent and its patches.")
        sources = [stored(lineage, patch, candidate.weight(patch)) for patch in candidate.patches]
        for copy, original in copied_among(lineage, before, candidate.patches).items():
            raise Rejected(
                "copies", f"The candidate merges patches {short(original)} and {short(copy)}: one is a copy."
            )
        after = self._merge(candidate.parent, before, sources, candidate.merge).at(candidate.alpha)
        if canonical.blob_ref(blob.pack(after)) != candidate.result:
            raise Rejected("digest", "Recomputing the merge gives another result than the candidate's.")
        control = mean_control(lineage, sources)
        if (None if control is None else canonical.blob_ref(control)) != candidate.control:
            raise Rejected("digest", "Recomputing the mean of the control variates gives another than the candidate's.")
        return self._scores_of(before, after, self._plain_mean(candidate.parent, before, sources))

    def _plain_mean(self, parent: VersionId, before: State, sources: Sequence[Source]) -> Scores:
        """On the deciding split; none where it has no finite scores, which says nothing against the candidate: nothing
        clips what the plain mean takes in."""
        equal = [replace(source, weight=1.0) for source in sources]
        try:
            return self._score(self._merge(parent, before, equal, PLAIN_MEAN).at(1.0), "test")
        except Rejected as error:
            log.info("the plain mean of the same patches has no scores: %s", error.message)
            return {}

    def _scores_of(self, before: State, after: State, plain_mean: Scores | None = None) -> tuple[DomainScore, ...]:
        """plain_mean: None where nothing was merged, and it is what the candidate is."""
        base, parent, new = (
            self._score(state, "test") for state in (version_state(self.lineage, self.lineage.model), before, after)
        )
        plain = new if plain_mean is None else plain_mean
        return tuple(DomainScore(d, base[d], parent[d], new[d], plain.get(d)) for d in sorted(new))

    def _verdict(
        self, candidate: Candidate, version: VersionId, reason: str, scores: tuple[DomainScore, ...]
    ) -> Verdict:
        log.info("version %s (%s): %s", candidate.number, short(version), f"reject: {reason}" if reason else "accept")
        return Verdict(
            maintainer=self.me,
            model=candidate.model,
            round=candidate.round,
            version=version,
            accept=not reason,
            reason=reason[:256],
            scores=scores,
        )

    def _brought(self, patch: PatchId) -> Experts:
        """The experts that the patch adds to its parent's. Raises Rejected when it is not known here."""
        header = self.lineage.patches.get(patch)
        if header is None or header.kind != KIND:
            return ()
        return new_experts(self.lineage, header, patch_change(self.lineage, header))

    def _merge(self, parent: VersionId, before: State, sources: Sequence[Source], spec: MergeSpec) -> Merged:
        began = time.monotonic()
        merged = merge(self.lineage, parent, before, sources, spec)
        self._observe_merge(time.monotonic() - began)
        return merged

    def _score(self, state: State, split: str) -> Scores:
        key = (canonical.digest(blob.pack(state)), split)
        self._demand_running()
        if key not in self._scores:
            self._scores[key] = self._examiner.score(state, "tune" if split == "tune" else "test")
            log.debug("exam (%s): mean %.4f nats per byte", split, mean(self._scores[key]))
        return self._scores[key]

    def _examiner_of(self, exam: BlobRef) -> Examiner:
        """Raises Rejected for an exam that cannot be used."""
        suite = Suite.unpack(self.lineage.home.objects.load(exam.digest), exam.size)
        return Examiner(self._model, self._tokenizer, self._kind, suite)

    def _follow_exam(self) -> None:
        """An amendment may have brought another exam since."""
        if self.lineage.manifest.exam != self._exam:
            self._exam = self.lineage.manifest.exam
            self._examiner = self._examiner_of(self._exam)
            self._scores.clear()

    def _demand_running(self) -> None:
        if self._stopped.is_set():
            raise NotRunning("The node is stopping.")
