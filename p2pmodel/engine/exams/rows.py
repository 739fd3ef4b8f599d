"""The files of a suite: exam.toml, and JSON lines. Nobody vouches for them, so everything has a limit."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from p2pmodel.domain.errors import InvalidInput

Split = Literal["tune", "test"]
SPLITS: tuple[Split, ...] = ("tune", "test")
"""tune: for choices such as α, and to screen patches; test: for decisions."""

INDEX = "exam.toml"
MAX_ROWS = 100_000
MAX_TEXT_BYTES = 1 << 20
MAX_ANSWER_TOKENS = 256
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")

Files = Mapping[str, bytes]
Row = TypeVar("Row", bound=msgspec.Struct)


class Folder(Mapping[str, bytes]):
    """The plain files of a folder, by name; links are not followed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> bytes:
        path = self._folder / name
        if path.is_symlink() or not path.is_file():
            raise KeyError(name)
        try:
            return path.read_bytes()
        except OSError as error:
            raise InvalidInput(f"{name} of the exam cannot be read: {error.strerror or error}.") from None

    def __iter__(self) -> Iterator[str]:
        return (path.name for path in self._folder.iterdir())

    def __len__(self) -> int:
        return sum(1 for _ in self._folder.iterdir())


@dataclass(frozen=True)
class Entry:
    """One table of exam.toml: `table` is its kind, `settings` what it says beside name, tune, test and tolerance."""

    table: str
    name: str
    tune: str
    test: str
    tolerance: float | None
    settings: Mapping[str, object]

    @classmethod
    def read(cls, table: str, raw: object) -> "Entry":
        """Raises InvalidInput."""
        if not isinstance(raw, dict) or not all(isinstance(raw.get(key), str) for key in ("name", *SPLITS)):
            raise InvalidInput(
                f"A {table} in {INDEX} lacks its name, tune or test.", f"Each [[{table}]] needs all three."
            )
        name, tolerance = raw["name"], raw.get("tolerance")
        if not _NAME.fullmatch(name):
            raise InvalidInput(
                f"{name[:64]!r} is no name for a {table}.", "Use at most 64 letters, digits, '-', '_' and '.'."
            )
        if tolerance is not None and not (type(tolerance) in (int, float) and 0 <= tolerance < 1):
            raise InvalidInput(f"The tolerance of {table} {name} is no number from 0 to 1.")
        rest = {key: value for key, value in raw.items() if key not in ("name", "tolerance", *SPLITS)}
        return cls(table, name, raw["tune"], raw["test"], None if tolerance is None else float(tolerance), rest)

    def demand_known(self, *settings: str) -> None:
        """Raises InvalidInput for a setting that the kind does not have."""
        if unknown := sorted(set(self.settings) - set(settings)):
            raise InvalidInput(f"The {self.table} {self.name} in {INDEX} has no setting {unknown[0][:64]!r}.")

    def whole(self, setting: str, default: int, most: int) -> int:
        """Raises InvalidInput when it is no whole number from 1 to `most`."""
        value = self.settings.get(setting, default)
        if type(value) is not int or not 1 <= value <= most:
            raise InvalidInput(f"{setting} of {self.table} {self.name} is no whole number from 1 to {most}.")
        return value

    def positive(self, setting: str, default: float) -> float:
        """Raises InvalidInput when it is no number above 0, at most 100."""
        value = self.settings.get(setting, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 100:
            raise InvalidInput(f"{setting} of {self.table} {self.name} is no number above 0.")
        return float(value)


def read_index(files: Files) -> dict[str, object]:
    """Raises InvalidInput."""
    if INDEX not in files:
        raise InvalidInput(f"The exam has no {INDEX}.")
    try:
        return tomllib.loads(files[INDEX].decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidInput(f"{INDEX} is not valid TOML: {error}.") from None


def read_rows(name: str, files: Files, kind: type[Row]) -> tuple[Row, ...]:
    """The rows of a JSON lines file, blank lines left out. Raises InvalidInput that names the line that is wrong."""
    if not _NAME.fullmatch(name) or not name.endswith(".jsonl"):
        raise InvalidInput(
            f"{name[:64]!r} is no plain file name that ends in .jsonl.", "An exam's files lie side by side."
        )
    if name not in files:
        raise InvalidInput(f"{name} is named in {INDEX}, but is not there.")
    decoder = msgspec.json.Decoder(kind)
    rows: list[Row] = []
    for number, line in enumerate(files[name].split(b"\n"), 1):
        if not line.strip():
            continue
        if len(line) > MAX_TEXT_BYTES or len(rows) == MAX_ROWS:
            raise InvalidInput(
                f"Line {number} of {name} is one too many, or too long.",
                f"A file has at most {MAX_ROWS} rows, and a row {MAX_TEXT_BYTES} bytes.",
            )
        try:
            rows.append(decoder.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInput(f"Line {number} of {name} is not a row that can be used: {error}.") from None
    if not rows:
        raise InvalidInput(f"{name} holds no rows.")
    return tuple(rows)
