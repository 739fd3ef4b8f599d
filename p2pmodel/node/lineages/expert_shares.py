"""What routers of modular experts chose for some texts: noted in the home, for its node's status page."""

import json
from dataclasses import asdict, dataclass

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.node.lineages.lineage import Lineage

MOST_TEXTS = 64


@dataclass(frozen=True)
class Shares:
    """names: of the experts, and `none`; rows: by file, the mean share of each over layers and excerpts."""

    names: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]


def note_shares(lineage: Lineage, number: str, shares: Shares) -> None:
    """Of the version of that number, in place of what was noted before. Raises StorageError, and InvalidInput for what
    are no shares."""
    short = Shares(
        shares.names, tuple((name, tuple(round(x, 4) for x in row)) for name, row in shares.rows[:MOST_TEXTS])
    )
    if not _are_shares(short):
        raise InvalidInput(f"The routers' choices can't be noted: shares of {number}'s experts are not from 0 to 1.")
    lineage.home.refs.set(lineage.notes.ref("shares"), json.dumps({"number": number, **asdict(short)}))


def noted_shares(lineage: Lineage) -> tuple[str, Shares] | None:
    """The number of a version, and its experts' shares; None where none were noted, or what are none. Raises
    StorageError."""
    note = lineage.home.refs.get(lineage.notes.ref("shares"))
    if note is None:
        return None
    read = json.loads(note)
    rows = tuple((str(name), tuple(float(share) for share in row)) for name, row in read["rows"])
    shares = Shares(tuple(map(str, read["names"])), rows)
    return (str(read["number"]), shares) if _are_shares(shares) else None


def _are_shares(shares: Shares) -> bool:
    return all(0.0 <= share <= 1.0 for _, row in shares.rows for share in row)
