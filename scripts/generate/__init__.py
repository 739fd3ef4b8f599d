"""Committed files that follow from the code. Each module here has the texts of some, by path, as `files()`."""

import importlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAKERS = ("commands", "control", "dashboards", "metrics")


def outdated(maker: str, root: Path = ROOT) -> dict[str, str]:
    """Of the maker's files those that are not as they should be, with what should be there."""
    files: dict[str, str] = importlib.import_module(f"{__name__}.{maker}").files()
    here = {path: root / path for path in files if (root / path).exists()}
    return {p: text for p, text in files.items() if p not in here or here[p].read_text(encoding="utf-8") != text}


def write(files: dict[str, str], root: Path = ROOT) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
