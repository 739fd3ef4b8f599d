"""A user's own vectors over the swarm: a patch that nobody else has merged, or what is being trained."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ids import PatchId, VersionId
from p2pmodel.domain.patch import Patch
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import patch_file_state, patch_state, version_state
from p2pmodel.tensors import ia3
from p2pmodel.wire import bundle


def private_vectors(lineage: Lineage, patch: str) -> tuple[VersionId, dict[str, Tensor]]:
    """The version that a session with this patch begins from, and the vectors that it carries: all (IA)³ slots.

    patch: a file, or the id of a known patch. Raises NotFound, Rejected, InvalidInput for a patch of another model, and
    for kinds that are folded into weights, which no session can carry.
    """
    path = Path(patch)
    if not path.is_file():
        return vectors_of_known(lineage, lineage.find_patch(patch))
    noun = bundle.open_bundle(path.read_bytes()).patch
    if noun.model != lineage.model:
        raise InvalidInput(f"{path} is a patch of another model than {lineage.manifest.name}.")
    _demand_vectors(noun)
    return _begin(lineage, noun, patch_file_state(lineage, path))


def vectors_of_known(lineage: Lineage, patch: PatchId) -> tuple[VersionId, dict[str, Tensor]]:
    """The same, of a patch that is in the home."""
    noun = lineage.patches[patch]
    _demand_vectors(noun)
    return _begin(lineage, noun, patch_state(lineage, noun))


def carries(patch: Patch) -> bool:
    """Whether a session can carry what the patch changes."""
    return patch.kind.startswith("ia3@")


def _demand_vectors(patch: Patch) -> None:
    if not carries(patch):
        raise InvalidInput(
            f"A patch of kind {patch.kind} changes what is on other machines, and a session can't carry it.",
            "Only ia3 patches can be used before they are merged; try it alone with: p2pmodel eval --patch",
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
