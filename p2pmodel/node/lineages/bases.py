"""Where the base checkpoint of a lineage lies: it stays where the user or the hub's cache keeps it, and is found by
digest. Nobody needs all of it: a host needs the files that hold its layers, a client those of embeddings and head.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from p2pmodel import starter
from p2pmodel.domain.errors import InvalidInput, NotFound, Rejected
from p2pmodel.domain.model import BlobRef, Manifest, ModelFile
from p2pmodel.node.lineages import hub
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.store.home import Home

if TYPE_CHECKING:
    from p2pmodel.engine.checkpoint import Checkpoint

Say = Callable[[str], None]
WEIGHTS = ".safetensors"
STAMP_DIGITS, MAX_STAMPS = 8, 400
NO_STAMP = "-" * STAMP_DIGITS


class Part(Enum):
    """What of a checkpoint somebody needs, beside its configuration and tokenizer."""

    WHOLE = "all of its weights"
    HEAD = "what no layer holds"
    OUTLINE = "no weights yet"


def file_digests(folder: Path, names: Collection[str]) -> tuple[ModelFile, ...]:
    """Reads and hashes every file. Raises InvalidInput when one can't be read."""
    return tuple(ModelFile(name, _describe(folder / name)) for name in sorted(names))


def is_base_of(folder: Path, manifest: Manifest) -> bool:
    """Whether the folder holds files of the Manifest and no others in their place: its configuration at least. Sizes
    are compared before anything is hashed."""
    here = [file for file in manifest.files if (folder / file.name).is_file()]
    if "config.json" not in {file.name for file in here}:
        return False
    return all(_size(folder, file.name) == file.blob.size for file in here) and not _different(folder, here)


def find_base(
    home: Home, lineage: Lineage, given: Path | None = None, say: Say = lambda _: None, part: Part = Part.WHOLE
) -> Path:
    """The folder of the base checkpoint, with the files that `part` needs: the given one, the remembered one, the
    starter that ships with the package, or from the hub, when the Manifest names one.

    Raises NotFound, InvalidInput that names a file that is missing in the given folder, or Rejected("digest") for files
    that are others than the Manifest's."""
    if given is not None:
        _require(home, lineage, given, part)
        return given
    for folder in filter(None, (_remembered(home, lineage), starter.MODEL)):
        try:
            _require(home, lineage, folder, part)
        except (InvalidInput, Rejected, NotFound):
            continue
        return folder
    if source := hub.Source.parse(lineage.manifest.source):
        return _fetch(home, lineage, source, part, say)
    raise NotFound(
        f"The base checkpoint of {lineage.manifest.name} is not on this machine.", "Name its folder with --base."
    )


def open_base(lineage: Lineage, folder: Path, say: Say = lambda _: None) -> "Checkpoint":
    """The checkpoint in a folder that `find_base` gave. Files that a span needs later are verified then, and fetched
    when they come from a hub."""
    import dataclasses

    from p2pmodel.engine.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(folder, [file.name for file in lineage.manifest.files])
    return dataclasses.replace(checkpoint, provide=partial(_provide, lineage.home, lineage, folder, say))


def found_on_hub(text: str, known: Sequence[Lineage], say: Say = lambda _: None) -> Lineage | hub.Listing:
    """The lineage that began with the checkpoint of this hub id, or else what the hub lists of it. Raises NotFound,
    Unreachable."""
    source = hub.Source.parse(text)
    assert source is not None
    for lineage in known:
        if has_source(lineage, source):
            return lineage
    say(f"asking the hub for {source}")
    return hub.list_files(source)


def has_source(lineage: Lineage, source: hub.Source) -> bool:
    """Whether the lineage's base is of that repository, at that commit where one is named."""
    base = hub.Source.parse(lineage.manifest.source)
    return base is not None and base.repository == source.repository and base.commit.startswith(source.commit)


def outline(listing: hub.Listing) -> tuple[Path, tuple[ModelFile, ...]]:
    """Fetches what describes the checkpoint, and what the hub tells no digest of. -> its folder in the hub's cache, and
    the files that make it up. Raises InvalidInput when it is no model that can be used."""
    from p2pmodel.engine.checkpoint import GENERATION, TOKENIZER_FILES, read_checkpoint
    from p2pmodel.engine.weights import INDEX

    described = ("config.json", GENERATION, INDEX, *TOKENIZER_FILES)
    if "config.json" not in listing.sizes:
        raise InvalidInput(f"{listing.source} is no checkpoint of transformers: it has no config.json.")
    folder = hub.fetch_small(listing.source, [name for name in described if name in listing.sizes])
    names = read_checkpoint(folder, tuple(listing.sizes)).files
    if missing := [name for name in names if name not in listing.sizes]:
        raise InvalidInput(f"{listing.source} lacks {missing[0]}, which its index names.")
    unknown = [name for name in names if name not in listing.digests and not (folder / name).is_file()]
    if unknown:
        hub.fetch_small(listing.source, unknown)
    here = {name for name in names if (folder / name).is_file()}
    return folder, tuple(
        ModelFile(
            name, _describe(folder / name) if name in here else BlobRef(listing.digests[name], listing.sizes[name])
        )
        for name in sorted(names)
    )


def remember_base(home: Home, lineage: Lineage, folder: Path, names: Collection[str]) -> None:
    """Notes a folder, and the state of the files there that were compared with the Manifest: each is hashed once."""
    known = _verified(home, lineage, folder) | {name: _stamp(folder, name) for name in names}
    stamps = "".join(known.get(file.name, NO_STAMP) for file in lineage.manifest.files)
    # Files beyond what a ref holds are hashed again at every start.
    note = json.dumps({"folder": str(folder.resolve()), "stamps": stamps[: STAMP_DIGITS * MAX_STAMPS]})
    if home.refs.get(_ref(lineage)) != note:
        home.refs.set(_ref(lineage), note)


def inherit_base(home: Home, lineage: Lineage, branch: Lineage) -> None:
    """What is noted of where a lineage's base lies goes for another one over the same files."""
    if (note := home.refs.get(_ref(lineage))) and branch.manifest.files == lineage.manifest.files:
        home.refs.set(_ref(branch), note)


def _require(home: Home, lineage: Lineage, folder: Path, part: Part) -> None:
    """The files that describe the checkpoint, then those that `part` needs of the weights."""
    manifest = lineage.manifest
    _verify(home, lineage, folder, [file.name for file in manifest.files if not file.name.endswith(WEIGHTS)])
    _verify(home, lineage, folder, _weights_of(manifest, folder, part))


def _fetch(home: Home, lineage: Lineage, source: hub.Source, part: Part, say: Say) -> Path:
    files = {file.name: file for file in lineage.manifest.files}
    folder = hub.cached_folder(source)
    small = [file for name, file in files.items() if not name.endswith(WEIGHTS)]
    if folder is None or any(not (folder / file.name).is_file() for file in small):
        say(f"fetching the base checkpoint {source.repository}")
        folder = hub.fetch(source, small)
    _verify(home, lineage, folder, [file.name for file in small])
    _provide(home, lineage, folder, say, _weights_of(lineage.manifest, folder, part))
    return folder


def _provide(home: Home, lineage: Lineage, folder: Path, say: Say, names: Sequence[str]) -> None:
    source = hub.Source.parse(lineage.manifest.source)
    missing = [file for file in lineage.manifest.files if file.name in names and not (folder / file.name).is_file()]
    if missing and source and hub.cached_folder(source) == folder:
        size = sum(file.blob.size for file in missing)
        say(f"fetching {len(missing)} of {len(lineage.manifest.files)} files, {size / 1e6:.1f} MB")
        hub.fetch(source, missing)
    _verify(home, lineage, folder, names)


def _weights_of(manifest: Manifest, folder: Path, part: Part) -> tuple[str, ...]:
    if part is Part.WHOLE:
        return tuple(file.name for file in manifest.files if file.name.endswith(WEIGHTS))
    if part is Part.OUTLINE:
        return ()
    from p2pmodel.engine.checkpoint import read_checkpoint

    return read_checkpoint(folder, [file.name for file in manifest.files]).weight_files(None)


def _verify(home: Home, lineage: Lineage, folder: Path, names: Collection[str]) -> None:
    """Each of the files is there and is the Manifest's. Raises InvalidInput, Rejected("digest")."""
    known = _verified(home, lineage, folder)
    files = [file for file in lineage.manifest.files if file.name in names]
    for file in files:
        if not (folder / file.name).is_file():
            raise InvalidInput(f"{folder} lacks {file.name}, which is needed here.", "Get the file, or other layers.")
    new = [file for file in files if known.get(file.name) != _stamp(folder, file.name)]
    if wrong := [f for f in new if _size(folder, f.name) != f.blob.size] or _different(folder, new):
        raise Rejected(
            "digest",
            f"{wrong[0].name} in {folder} is not that of the base of {lineage.manifest.name}.",
            "Get the same release of the checkpoint that the Manifest names: p2pmodel model show",
        )
    if new or not known:
        remember_base(home, lineage, folder, [file.name for file in files])


def _different(folder: Path, files: Sequence[ModelFile]) -> list[ModelFile]:
    return [file for file in files if _describe(folder / file.name) != file.blob]


def _describe(path: Path) -> BlobRef:
    try:
        return hub.describe(path)
    except OSError as error:
        raise InvalidInput(f"{path} can't be read: {error.strerror}.") from None


def _remembered(home: Home, lineage: Lineage) -> Path | None:
    folder = json.loads(home.refs.get(_ref(lineage)) or "{}").get("folder")
    return Path(folder) if folder and Path(folder).is_dir() else None


def _verified(home: Home, lineage: Lineage, folder: Path) -> dict[str, str]:
    """Stamps of files in the folder, at the time when they were found to be the Manifest's."""
    note = json.loads(home.refs.get(_ref(lineage)) or "{}")
    if note.get("folder") != str(folder.resolve()):
        return {}
    stamps = str(note.get("stamps", ""))
    parts = [stamps[at : at + STAMP_DIGITS] for at in range(0, len(stamps), STAMP_DIGITS)]
    return {f.name: stamp for f, stamp in zip(lineage.manifest.files, parts, strict=False) if stamp != NO_STAMP}


def _size(folder: Path, name: str) -> int:
    return (folder / name).stat().st_size


def _stamp(folder: Path, name: str) -> str:
    stat = (folder / name).stat()
    return hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:STAMP_DIGITS]


def _ref(lineage: Lineage) -> str:
    return lineage.notes.ref("base")
