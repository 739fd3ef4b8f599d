"""A history drawn with characters, the newest first, as git draws commits: `*` a version, `o` a patch that it merged,
`x` one that it left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Commit:
    """parent: None for the first. merged, left_out: a line of text for each patch."""

    id: str
    parent: str | None
    text: str
    merged: Sequence[str] = ()
    left_out: Sequence[str] = ()


def draw(commits: Sequence[Commit]) -> str:
    """commits: parents before children. A lane for every line of versions that is under way."""
    lanes: list[str] = []
    lines: list[str] = []
    known: Mapping[str, Commit] = {commit.id: commit for commit in commits}
    for commit in reversed(commits):
        if commit.id not in lanes:
            lanes.append(commit.id)
        column = lanes.index(commit.id)
        for other in [place for place, lane in enumerate(lanes) if lane == commit.id][:0:-1]:
            lines.append("| " * (other - 1) + "|/" + " |" * (len(lanes) - other - 1))
            del lanes[other]
        marks = ["*" if place == column else "|" for place in range(len(lanes))]
        lines.append(f"{' '.join(marks)}  {commit.text}")
        beside = "| " * len(lanes)
        patches = [f"o  {text}" for text in commit.merged] + [f"x  {text}" for text in commit.left_out]
        if patches:
            single = column == len(lanes) - 1
            lines += ["| " * column + "|\\"] if single else []
            lines += [beside + patch for patch in patches]
            lines += ["| " * column + "|/"] if single else []
        if commit.parent in known:
            lanes[column] = str(commit.parent)
        else:
            del lanes[column]
    return "\n".join(line.rstrip() for line in lines)
