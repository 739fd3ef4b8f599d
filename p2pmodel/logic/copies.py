"""Which patches of a round are copies of others.

A copy counts its original twice in the merge, and takes the credit for it. Two updates point the same way only when one
was made from the other, or both were made from the same data in the same way; either way the second says nothing new.
How long they are says nothing, so a copy that was scaled is one too. Copies that were disturbed by more than `ALIKE`
lets pass are not found: the exam and the clips of the merge have to bear them.
"""

from collections.abc import Callable, Sequence

from p2pmodel.domain.ids import PatchId

ALIKE = 0.999
"""The cosine of two updates from which on they count as the same."""


def copies(
    patches: Sequence[PatchId],
    cosines: Callable[[PatchId, Sequence[PatchId]], Sequence[float]],
    enters: Callable[[PatchId], bool] = lambda patch: True,
) -> dict[PatchId, PatchId]:
    """By each copy, what it is a copy of. patches: the first seen first; cosines: of one of them with each of some;
    enters: whether one that is no copy takes part in the merge, asked in their order. A patch is a copy only of one
    that takes part, so that nobody drives a patch out with a copy of it that harms.

    Which of two is the copy goes by the order; whether there are any among those that take part does not, so that
    everybody agrees on it.
    """
    found: dict[PatchId, PatchId] = {}
    kept: list[PatchId] = []
    for patch in patches:
        alike = (before for before, cosine in zip(kept, cosines(patch, kept), strict=True) if cosine >= ALIKE)
        original = next(alike, None)
        if original is not None:
            found[patch] = original
        elif enters(patch):
            kept.append(patch)
    return found
