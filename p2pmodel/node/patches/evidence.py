"""What an audit needs: the states of a training, from wherever they are to be had, and its data."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from p2pmodel.domain.errors import InvalidInput, P2PModelError
from p2pmodel.domain.ids import Digest, short
from p2pmodel.domain.patch import DataFile
from p2pmodel.store.home import Home
from p2pmodel.wire import canonical

Find = Callable[[Digest], bytes | None]


def find_in(*places: Find) -> Find:
    """The first that has it."""
    return lambda digest: next((raw for place in places if (raw := place(digest)) is not None), None)


def in_home(home: Home) -> Find:
    def find(digest: Digest) -> bytes | None:
        return home.objects.load(digest) if home.objects.has(digest) else None

    return find


def in_folder(folder: Path) -> Find:
    """Files whose names are their digests, whatever their suffix."""

    def find(digest: Digest) -> bytes | None:
        return next((path.read_bytes() for path in sorted(folder.glob(f"{digest}*")) if path.is_file()), None)

    return find


def verified(find: Find) -> Find:
    """What is not what its digest says counts as missing."""

    def taken(digest: Digest) -> bytes | None:
        try:
            raw = find(digest)
        except P2PModelError:
            return None
        return raw if raw is not None and canonical.digest(raw) == digest else None

    return taken


def in_order(wanted: Sequence[DataFile], files: Sequence[Path]) -> list[Path]:
    """As the training had them. Raises InvalidInput naming one that is not there, or is another."""
    found: dict[str, Path] = {}
    for path in files:
        try:
            with path.open("rb") as opened:
                found[hashlib.file_digest(opened, "sha256").hexdigest()] = path
        except OSError as error:
            raise InvalidInput(f"{path} can't be read: {error.strerror}.") from None
    for file in wanted:
        if file.digest not in found:
            other = " The file of that name is another." if file.name in {path.name for path in files} else ""
            raise InvalidInput(
                f"{file.name}, SHA-256 {short(file.digest)}…, is not among the files given.{other}",
                "Ask the contributor for the data: a training can only be done again with them.",
            )
    return [found[file.digest] for file in wanted]
