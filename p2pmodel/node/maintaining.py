"""A maintainer's work: examine patches, merge them, propose a candidate; recompute others' candidates, sign a verdict.

All of it blocks for seconds to minutes and belongs on a thread of its own. What decides is in `p2pmodel.logic`; the
mathematics is in `p2pmodel.tensors`.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from p2pmodel.domain.errors import NotRunning, Rejected
from p2pmodel.domain.ids import PatchId, PeerId, VersionId, short
from p2pmodel.domain.model import BlobRef, MergeSpec
from p2pmodel.domain.version import Candidate, DomainScore, LeftOut, Verdict
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole
from p2pmodel.engine.exams import Examiner, Suite, search_alpha
from p2pmodel.logic.judgement import mean, objective, why_leave_out, why_reject
from p2pmodel.node.lineage import Lineage
from p2pmodel.node.states import patch_tensors, version_state
from p2pmodel.tensors import blob
from p2pmodel.tensors.kinds import get_kind
from p2pmodel.tensors.merge import Contribution, apply_update, get_strategy
from p2pmodel.wire import canonical

State = Mapping[str, Tensor]
Scores = dict[str, float]
log = logging.getLogger(__name__)

PLAIN_MEAN = MergeSpec("mean@1")


@dataclass(frozen=True)
class Proposal:
    candidate: Candidate
    result: bytes


class Maintainer:
    def __init__(self, lineage: Lineage, me: PeerId, base: Path, observe_merge: Callable[[float], None]) -> None:
        """base: folder of the whole checkpoint. observe_merge is told the seconds of every merge."""
        self.lineage, self.me, self._observe_merge = lineage, me, observe_merge
        manifest = lineage.manifest
        self._kind = get_kind(manifest.kinds[0])
        suite = Suite.unpack(lineage.home.objects.load(manifest.exam.digest), manifest.exam.size)
        self._examiner = Examiner(load_whole(base), load_tokenizer(base), self._kind, suite)
        self._scores: dict[tuple[str, str], Scores] = {}
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Work under way on another thread ends within one exam, with NotRunning."""
        self._stopped.set()

    def propose(self, round: int, parent: VersionId, patches: tuple[PatchId, ...]) -> Proposal | None:
        """Examines the patches one by one on the tuning split, merges those that help, and finds α there.
        None when nothing is left to merge."""
        lineage, manifest = self.lineage, self.lineage.manifest
        before = version_state(lineage, parent)
        tuning = self._score(before, "tune")
        left_out = []
        for patch in patches:
            alone = {**before, **patch_tensors(lineage, lineage.patches[patch].adapter)}
            if reason := why_leave_out(tuning, self._score(alone, "tune")):
                log.info("patch %s is left out: %s", short(patch), reason)
                left_out.append(LeftOut(patch, reason))
        entering = tuple(sorted(set(patches) - {x.patch for x in left_out}))
        if not entering:
            return None
        update = self._combine(before, entering, manifest.merge)
        alpha = search_alpha(
            lambda a: objective(tuning, self._score(apply_update(before, update, a), "tune"), manifest.limits)
        )
        result = blob.pack(apply_update(before, update, alpha))
        candidate = Candidate(
            model=lineage.model,
            round=round,
            parent=parent,
            number=lineage.number(parent).next_patch(),
            patches=entering,
            left_out=tuple(sorted(left_out, key=lambda x: x.patch)),
            merge=manifest.merge,
            alpha=alpha,
            result=BlobRef(canonical.digest(result), len(result)),
        )
        return Proposal(candidate, result)

    def examine(self, version: VersionId) -> Verdict:
        """Recomputes the merge and examines the result on the deciding split."""
        candidate = self.lineage.candidates[version]
        try:
            scores = self._examine(candidate)
        except Rejected as error:
            return self._verdict(candidate, version, error.message, ())
        parent, new = ({s.domain: getattr(s, name) for s in scores} for name in ("parent", "candidate"))
        return self._verdict(candidate, version, why_reject(parent, new, self.lineage.manifest.limits), scores)

    def _examine(self, candidate: Candidate) -> tuple[DomainScore, ...]:
        lineage, manifest = self.lineage, self.lineage.manifest
        if candidate.number != lineage.number(candidate.parent).next_patch():
            raise Rejected("chain", f"The candidate is numbered {candidate.number}, which does not follow its parent.")
        if candidate.merge != manifest.merge:
            raise Rejected("chain", "The candidate was not merged as the Manifest says.")
        before = version_state(lineage, candidate.parent)
        after = apply_update(before, self._combine(before, candidate.patches, candidate.merge), candidate.alpha)
        if canonical.digest(blob.pack(after)) != candidate.result.digest:
            raise Rejected("digest", "Recomputing the merge gives another result than the candidate's.")
        plain = apply_update(before, self._combine(before, candidate.patches, PLAIN_MEAN), 1.0)
        base, parent, new, plain_mean = (
            self._score(s, "test") for s in (version_state(lineage, lineage.model), before, after, plain)
        )
        return tuple(DomainScore(d, base[d], parent[d], new[d], plain_mean[d]) for d in sorted(new))

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

    def _combine(self, parent: State, patches: tuple[PatchId, ...], spec: MergeSpec) -> dict[str, Tensor]:
        lineage = self.lineage

        def contributions() -> Iterator[Contribution]:
            for patch in patches:
                if patch not in lineage.patches:
                    raise Rejected("patch", f"The candidate names patch {short(patch)}, which is not known here.")
                header = lineage.patches[patch]
                yield Contribution(
                    patch, patch_tensors(lineage, header.adapter), patch_tensors(lineage, header.fisher), 1.0
                )

        began = time.monotonic()
        update = get_strategy(spec.strategy).combine(parent, contributions, dict(spec.parameters))
        self._observe_merge(time.monotonic() - began)
        return update

    def _score(self, state: State, split: str) -> Scores:
        key = (canonical.digest(blob.pack(state)), split)
        if self._stopped.is_set():
            raise NotRunning("The node is stopping.")
        if key not in self._scores:
            self._scores[key] = self._examiner.score(state, "tune" if split == "tune" else "test")
            log.debug("exam (%s): mean %.4f nats per byte", split, mean(self._scores[key]))
        return self._scores[key]
