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
    patches: Sequence[PatchId], cosines: Callable[[PatchId, Sequence[PatchId]], Sequence[float]]
) -> dict[PatchId, PatchId]:
    """By each copy, what it is a copy of. patches: the first seen first; cosines: of one of them with each of some.

    Which of two is the copy goes by the order; whether there are any does not, so that everybody agrees on it.
    """
    found: dict[PatchId, PatchId] = {}
    kept: list[PatchId] = []
    for patch in patches:
        alike = (before for before, cosine in zip(kept, cosines(patch, kept), strict=True) if cosine >= ALIKE)
        original = next(alike, None)
        if original is None:
            kept.append(patch)
        else:
            found[patch] = original
    return found
