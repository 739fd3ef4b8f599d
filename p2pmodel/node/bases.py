"""Where the base checkpoint of a lineage lies: it stays where the user or the hub's cache keeps it, and is found by
digest."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from p2pmodel import starter
from p2pmodel.domain.errors import InvalidInput, NotFound, Rejected
from p2pmodel.domain.ids import Digest
from p2pmodel.domain.model import BlobRef, Manifest, ModelFile
from p2pmodel.node.lineage import Lineage
from p2pmodel.store.home import Home


def file_digests(folder: Path, names: tuple[str, ...]) -> tuple[ModelFile, ...]:
    """Reads and hashes every file. Raises InvalidInput when one can't be read."""
    files = []
    for name in sorted(names):
        path = folder / name
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files.append(ModelFile(name, BlobRef(Digest(digest), path.stat().st_size)))
        except OSError as error:
            raise InvalidInput(f"{path} can't be read: {error.strerror}.") from None
    return tuple(files)


def is_base_of(folder: Path, manifest: Manifest) -> bool:
    """Whether the folder holds exactly the files of the Manifest; sizes are compared before anything is hashed."""
    for file in manifest.files:
        path = folder / file.name
        if not path.is_file() or path.stat().st_size != file.blob.size:
            return False
    return file_digests(folder, tuple(f.name for f in manifest.files)) == manifest.files


def remember_base(home: Home, lineage: Lineage, folder: Path) -> None:
    """Notes a folder that was compared with the Manifest, and the state of its files: it is hashed only once."""
    note = json.dumps({"folder": str(folder.resolve()), "stamp": _stamp(folder, lineage.manifest)})
    if home.refs.get(_ref(lineage)) != note:
        home.refs.set(_ref(lineage), note)


def find_base(
    home: Home, lineage: Lineage, given: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> Path:
    """The folder of the base checkpoint: the given one, the remembered one, the starter that ships with the package, or
    from the hub, when the Manifest names one. Raises NotFound, or Rejected("digest") when the given one is another."""
    manifest = lineage.manifest
    note = json.loads(home.refs.get(_ref(lineage)) or "{}")
    if (
        given is None
        and note
        and Path(note["folder"]).is_dir()
        and note["stamp"] == _stamp(Path(note["folder"]), manifest)
    ):
        return Path(note["folder"])
    if given is not None:
        if not is_base_of(given, manifest):
            raise Rejected(
                "digest",
                f"The files in {given} are not those of the base of {manifest.name}.",
                "Get the same release of the checkpoint that the Manifest names: p2pmodel model show",
            )
        remember_base(home, lineage, given)
        return given
    for folder in filter(None, (starter.MODEL, Path(note["folder"]) if note else None)):
        if is_base_of(folder, manifest):
            remember_base(home, lineage, folder)
            return folder
    if manifest.source:
        say(f"fetching the base checkpoint {manifest.source}")
        folder = download(manifest.source, tuple(f.name for f in manifest.files))
        return find_base(home, lineage, folder)
    raise NotFound(f"The base checkpoint of {manifest.name} is not on this machine.", "Name its folder with --base.")


def download(hub_id: str, names: tuple[str, ...] | None = None) -> Path:
    """The checkpoint's folder in the hub's cache, complete; an interrupted download is resumed. Raises NotFound."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = list(names) if names else ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotFound(
            f"{hub_id!r} is neither a folder here nor a checkpoint that the hub gives out ({reason})."
        ) from None


def _stamp(folder: Path, manifest: Manifest) -> list[list[int]]:
    stats = [(folder / f.name).stat() for f in manifest.files if (folder / f.name).is_file()]
    return [[s.st_size, s.st_mtime_ns] for s in stats]


def _ref(lineage: Lineage) -> str:
    return f"models/{lineage.model}/base"
