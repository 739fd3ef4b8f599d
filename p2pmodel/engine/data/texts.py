"""Plain text files of a user's, read whole."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ids import Digest

MAX_TEXT_BYTES = 256 << 20


@dataclass(frozen=True)
class TextFile:
    """`name` is the base name, `digest` and `size` are of the file's bytes."""

    name: str
    digest: Digest
    size: int
    text: str


def read_texts(paths: Sequence[Path]) -> list[TextFile]:
    """Raises InvalidInput that names the first file that cannot be used, and why."""
    if not paths:
        raise InvalidInput("No text files were given.", "Name at least one UTF-8 text file.")
    return [read_text(Path(path)) for path in paths]


def read_text(path: Path) -> TextFile:
    """Raises InvalidInput."""
    name = path.name or str(path)
    if file_size(path) > MAX_TEXT_BYTES:
        raise InvalidInput(f"{name} is larger than {MAX_TEXT_BYTES >> 20} MiB.", "Train on a part of it.")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InvalidInput(f"{name} is not a UTF-8 text file.", "Convert it to UTF-8 text first.")
    if not text.strip():
        raise InvalidInput(f"{name} holds nothing but blanks.", "Name a file with text in it.")
    return TextFile(name, Digest(hashlib.sha256(raw).hexdigest()), len(raw), text)


def file_size(path: Path) -> int:
    """In bytes. Raises InvalidInput for what is no file, is not there, or is empty."""
    name = path.name or str(path)
    try:
        if path.is_dir():
            raise InvalidInput(f"{name} is a folder, not a text file.", "Name the files in it.")
        size = path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from None
    if not size:
        raise InvalidInput(f"{name} is empty.", "Name a file with text in it.")
    return size


def unreadable(path: Path, error: OSError) -> InvalidInput:
    name = path.name or str(path)
    if isinstance(error, FileNotFoundError):
        return InvalidInput(f"{name} does not exist.", "Check the path.")
    return InvalidInput(f"{name} cannot be read: {error.strerror or error}.", "Check its permissions.")
