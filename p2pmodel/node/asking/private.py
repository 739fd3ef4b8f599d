"""A user's own vectors and experts over the swarm: a patch that nobody else has merged, or what is being trained."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from p2pmodel.domain import modular
from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ids import PatchId, VersionId
from p2pmodel.domain.patch import Patch
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import (
    new_experts,
    patch_change,
    patch_file_state,
    patch_state,
    read_change,
    version_state,
)
from p2pmodel.store import patchfile
from p2pmodel.tensors import ia3
from p2pmodel.tensors.changes import Change
from p2pmodel.wire.frames import MAX_BODY_BYTES

MOST_BYTES = MAX_BODY_BYTES - (1 << 20)
"""Of slots that a session carries; the rest is for their names."""


def private_vectors(lineage: Lineage, patch: str) -> tuple[VersionId, dict[str, Tensor]]:
    """The version that a session with this patch begins from, and the slots that it carries: all (IA)³ slots, or those
    of a modular expert.

    patch: a file, or the id of a known patch. Raises NotFound, Rejected, InvalidInput for a patch of another model, and
    for kinds that are folded into weights, which no session can carry.
    """
    path = Path(patch)
    if not path.is_file():
        return vectors_of_known(lineage, lineage.find_patch(patch))
    opened = patchfile.read(path)
    noun = opened.patch
    if noun.model != lineage.model:
        raise InvalidInput(f"{path} is a patch of another model than {lineage.manifest.name}.")
    _demand_portable(noun)
    if noun.kind == modular.KIND:
        return _expert(lineage, noun, read_change(lineage, noun.kind, opened.raw.adapter))
    return _begin(lineage, noun, patch_file_state(lineage, path))


def vectors_of_known(lineage: Lineage, patch: PatchId) -> tuple[VersionId, dict[str, Tensor]]:
    """The same, of a patch that is in the home."""
    noun = lineage.patches[patch]
    _demand_portable(noun)
    if noun.kind == modular.KIND:
        return _expert(lineage, noun, patch_change(lineage, noun))
    return _begin(lineage, noun, patch_state(lineage, noun))


def carries(patch: Patch) -> bool:
    """Whether a session can carry what the patch changes."""
    return patch.kind.startswith("ia3@") or patch.kind == modular.KIND


def _demand_portable(patch: Patch) -> None:
    if not carries(patch):
        raise InvalidInput(
            f"A patch of kind {patch.kind} changes what is on other machines, and a session can't carry it.",
            "Only ia3 and expert patches can be used before they are merged; try it alone with: p2pmodel eval --patch",
        )


def _expert(lineage: Lineage, patch: Patch, change: Change) -> tuple[VersionId, dict[str, Tensor]]:
    """Beside those of its parent, or in place of one of them."""
    new_experts(lineage, patch, change)
    own = dict(change.values)
    size = sum(tensor.numel() * tensor.itemsize for tensor in own.values())
    if size > MOST_BYTES:
        raise InvalidInput(
            f"The expert has {size:,} bytes, and a session carries {MOST_BYTES:,} at most.",
            "Try it alone with: p2pmodel eval --patch",
        )
    return patch.parent, own


def demand_vectors(slots: Mapping[str, Tensor]) -> None:
    """Raises InvalidInput for anything but (IA)³ vectors."""
    if not all(name.startswith(ia3.PREFIX) for name in slots):
        raise InvalidInput(
            "Modular experts are not trained through the swarm.",
            "Train one on this machine: p2pmodel train --kind expert",
        )


def _begin(lineage: Lineage, patch: Patch, state: Mapping[str, Tensor]) -> tuple[VersionId, dict[str, Tensor]]:
    vectors = {name: tensor for name, tensor in state.items() if name.startswith(ia3.PREFIX)}
    # With every slot carried along, any version will do, and the head is the one that is served for sure.
    return lineage.head if len(vectors) == len(state) else patch.parent, vectors


def trainable_vectors(lineage: Lineage, version: VersionId) -> Mapping[str, Tensor]:
    """The (IA)³ slots of a version, to begin from. Raises InvalidInput when the lineage has none, NotFound."""
    state = version_state(lineage, version)
    vectors = {name: tensor for name, tensor in state.items() if name.startswith(ia3.PREFIX)}
    if not vectors:
        raise InvalidInput(
            f"{lineage.manifest.name} takes no ia3 patches, and only those are trained through the swarm.",
            "See what it takes: p2pmodel model show",
        )
    return vectors
