"""What commands print: results on stdout, as text or JSON, or in a file; everything else on stderr."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from p2pmodel.domain.errors import InvalidInput


def emit(data: Any, text: str, as_json: bool) -> None:
    """The result of a command, in the form that was asked for."""
    typer.echo(json.dumps(plain(data), indent=2) if as_json else text)


def plain(value: Any) -> Any:
    """Nouns as maps and lists that JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    return value


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as wide as it has to be; columns of figures are aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        figures = bool(rows) and all(_is_figure(row[index]) for row in rows)
        grid.add_column(name, justify="right" if figures else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def printable(text: str) -> str:
    """What somebody else wrote, without what would steer a terminal."""
    return "".join(character if character.isprintable() else "�" for character in text)


def size(count: float) -> str:
    """Bytes as people read them: 1.5 MB."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def duration(seconds: float) -> str:
    """Time as people read it: 40 s, 3 min, 5 h."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def counted(count: int, noun: str) -> str:
    """`1 patch`, `2 patches`, `3 layers`."""
    plural = f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def _is_figure(text: str) -> bool:
    return text.strip("-+% ").replace(".", "").replace(",", "").isdigit() or text in ("", "-")


def demand_place(path: Path) -> None:
    """Raises InvalidInput where no file can be written to: before the work, not after it."""
    folder = path.resolve().parent
    if not folder.is_dir():
        raise InvalidInput(f"{path} cannot be written: there is no folder {folder}.", "Make it, or name another file.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidInput(f"{path} cannot be written: {folder} may not be changed by you.", "Name another file.")
