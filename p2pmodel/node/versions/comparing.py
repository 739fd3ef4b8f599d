"""What lies between two versions: the values of their slots, and their exam scores."""

from dataclasses import dataclass

import torch

from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.modular import removed
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import version_state


@dataclass(frozen=True)
class SlotChange:
    """norm: Euclidean, of the difference; relative: of that to the norm before, 0 where both are 0; changed: how many
    of `elements` differ at all; largest: the difference of the greatest magnitude, at the flat index `at`."""

    slot: str
    norm: float
    relative: float
    changed: int
    elements: int
    largest: float
    at: int


@dataclass(frozen=True)
class ScoreChange:
    section: str
    before: float
    after: float


@dataclass(frozen=True)
class Comparison:
    """slots: those that differ, the greatest norm first; scores: of the sections that maintainers examined both on;
    added, removed: names of experts."""

    slots: tuple[SlotChange, ...]
    untouched: int
    scores: tuple[ScoreChange, ...]
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def compare(lineage: Lineage, before: VersionId, after: VersionId) -> Comparison:
    """Raises NotFound when the values of one are not here."""
    old, new = version_state(lineage, before), version_state(lineage, after)
    changes = []
    for name in sorted(old.keys() & new.keys()):
        a, b = (state[name].to(torch.float64).reshape(-1) for state in (old, new))
        difference = b - a
        changed = int(difference.count_nonzero())
        if changed:
            at = int(difference.abs().argmax())
            norm, scale = float(difference.norm()), float(a.norm())
            changes.append(
                SlotChange(name, norm, norm / scale if scale else 0.0, changed, a.numel(), float(difference[at]), at)
            )
    changes.sort(key=lambda change: (-change.norm, change.slot))
    was, now = scores_of(lineage, before), scores_of(lineage, after)
    scores = [ScoreChange(name, was[name], now[name]) for name in now if name in was]
    experts = lineage.experts(before), lineage.experts(after)
    return Comparison(
        tuple(changes),
        len(old.keys() & new.keys()) - len(changes),
        tuple(scores),
        removed(now=experts[0], before=experts[1]),
        removed(now=experts[1], before=experts[0]),
    )


def scores_of(lineage: Lineage, version: VersionId) -> dict[str, float]:
    """By section, from the verdicts that adopted the version, or for the base those of any version."""
    if version == lineage.model:
        return {score.domain: score.base for v in reversed(lineage.versions) for score in v.scores}
    return {score.domain: score.candidate for score in lineage.version(version).scores}
