"""Loss on a text of the user's, so that anyone can check a claim."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from p2pmodel.domain.ids import short
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole
from p2pmodel.engine.data import read_texts
from p2pmodel.engine.evaluation import evaluate
from p2pmodel.node.lineages.bases import find_base
from p2pmodel.node.lineages.discovery import local_lineage
from p2pmodel.node.lineages.states import patch_file_state, patch_state, version_state
from p2pmodel.node.patches.patchbook import read_patch
from p2pmodel.store.home import Home
from p2pmodel.tensors.kinds import Kinds


@dataclass(frozen=True)
class FileLoss:
    what: str
    nats_per_token: float
    nats_per_byte: float
    tokens: int
    bytes: int


def evaluate_files(
    home: Path | None, model: str | None, base: Path | None, version: str, patch: str | None, files: Sequence[Path]
) -> FileLoss:
    """Raises InvalidInput for texts that can't be used, NotFound for an unknown version or patch."""
    folder = Home.open(home)
    lineage = local_lineage(folder, model)
    texts = read_texts(files)
    if patch is None:
        chosen = lineage.find_version(version)
        state, what = version_state(lineage, chosen), f"{lineage.manifest.name} {lineage.number(chosen)}"
    elif Path(patch).is_file():
        state, what = patch_file_state(lineage, Path(patch)), f"{lineage.manifest.name} with {patch}"
    else:
        entry = read_patch(home, patch)
        state = patch_state(lineage, entry.patch)
        what = f"{lineage.manifest.name} {entry.parent_number} with patch {short(entry.id)}"
    folder_of_base = find_base(folder, lineage, base)
    result = evaluate(
        load_whole(folder_of_base),
        load_tokenizer(folder_of_base),
        Kinds(lineage.manifest.kinds),
        state,
        [text.text for text in texts],
    )
    return FileLoss(what, result.nats_per_token, result.nats_per_byte, result.tokens, result.bytes)
