"""Patches as people ask for them: by file or id, with what became of them."""

from dataclasses import dataclass
from pathlib import Path

from p2pmodel.domain.errors import NotFound
from p2pmodel.domain.ids import PatchId, abbreviates, short
from p2pmodel.domain.patch import Patch
from p2pmodel.node.lineages.lineage import Lineage, known_lineages
from p2pmodel.store import patchfile
from p2pmodel.store.home import Home


@dataclass(frozen=True)
class PatchEntry:
    """state: `merged into 1.0.1`, `left out of 1.0.1: …`, `waits for its round`, `missed its round`, or `not
    published`."""

    id: PatchId
    patch: Patch
    model_name: str
    parent_number: str
    state: str


def entries(lineage: Lineage) -> list[PatchEntry]:
    """Oldest first, as this home learned of them."""
    return [_entry(lineage, patch) for patch in lineage.patches]


def read_patch(home: Path | None, text: str) -> PatchEntry:
    """Of a file or an id. Raises NotFound, InvalidInput, Rejected."""
    folder = Home.open(home)
    path = Path(text)
    if path.is_file():
        opened = patchfile.read(path)
        lineage = next((x for x in known_lineages(folder) if x.model == opened.patch.model), None)
        if lineage is None:
            return PatchEntry(
                opened.id, opened.patch, "a model not known here", short(opened.patch.parent), "not published"
            )
        if opened.id in lineage.patches:
            return _entry(lineage, opened.id)
        return PatchEntry(
            opened.id, opened.patch, lineage.manifest.name, _parent(lineage, opened.patch), "not published"
        )
    for lineage in known_lineages(folder):
        matching = [p for p in lineage.patches if abbreviates(text, p)]
        if len(matching) == 1:
            return _entry(lineage, matching[0])
    raise NotFound(f"{text!r} is neither a patch file nor the id of a known patch.", "See: p2pmodel patch list")


@dataclass(frozen=True)
class OpenedPatch:
    """A patch with its tensors and its lineage. record: its signed header; fisher: empty where it is not here."""

    id: PatchId
    patch: Patch
    lineage: Lineage
    record: bytes
    adapter: bytes
    fisher: bytes


def open_patch(home: Path | None, text: str) -> OpenedPatch:
    """Of a file or an id, for those who compute with it. A file's tensors are checked as every peer does; those in the
    home have been. Raises NotFound, InvalidInput, Rejected."""
    folder, path = Home.open(home), Path(text)
    if path.is_file():
        from p2pmodel.node.lineages.intake import check_tensors  # loads torch, which a patch's header can do without

        opened = patchfile.read(path)
        lineage = _lineage(folder, opened.patch)
        raw = opened.raw
        check_tensors(lineage, opened.patch, *raw.blobs)
        return OpenedPatch(opened.id, opened.patch, lineage, raw.header, raw.adapter, raw.fisher)
    entry = read_patch(home, text)
    lineage, objects = _lineage(folder, entry.patch), folder.objects
    limit = lineage.largest_patch
    fisher = entry.patch.fisher.digest
    return OpenedPatch(
        entry.id,
        entry.patch,
        lineage,
        objects.load(entry.id),
        objects.load(entry.patch.adapter.digest, limit),
        objects.load(fisher, limit) if objects.has(fisher) else b"",
    )


def verify_patch(home: Path | None, text: str) -> PatchEntry:
    """All the checks of a peer that is offered the patch. Raises Rejected with the first that fails."""
    from p2pmodel.node.lineages.intake import check_patch_file, check_stored_patch

    folder = Home.open(home)
    path = Path(text)
    if path.is_file():
        opened = patchfile.read(path)
        check_patch_file(_lineage(folder, opened.patch), opened)
    else:
        entry = read_patch(home, text)
        check_stored_patch(_lineage(folder, entry.patch), entry.id)
    return read_patch(home, text)


def _lineage(home: Home, patch: Patch) -> Lineage:
    for lineage in known_lineages(home):
        if lineage.model == patch.model:
            return lineage
    raise NotFound(
        f"The patch is for model {short(patch.model)}, which is not known here.", "Join its swarm first: p2pmodel join"
    )


def _entry(lineage: Lineage, patch_id: PatchId) -> PatchEntry:
    patch = lineage.patches[patch_id]
    return PatchEntry(patch_id, patch, lineage.manifest.name, _parent(lineage, patch), state_of(lineage, patch_id))


def _parent(lineage: Lineage, patch: Patch) -> str:
    try:
        return str(lineage.number(patch.parent))
    except NotFound:
        return short(patch.parent)


def state_of(lineage: Lineage, patch_id: PatchId) -> str:
    """What became of a patch that the lineage knows: see PatchEntry."""
    for version in lineage.versions:
        number = version.candidate.number
        if patch_id in version.candidate.patches:
            return f"merged into {number}"
        for left in version.candidate.left_out:
            if left.patch == patch_id:
                return f"left out of {number}: {left.reason}"
    return "waits for its round" if lineage.patches[patch_id].parent == lineage.head else "missed its round"
