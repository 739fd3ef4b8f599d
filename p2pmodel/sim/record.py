"""What a simulation notes while it runs, and what is asked of it at the end."""

from collections import Counter
from dataclasses import dataclass, field

from p2pmodel.domain.ids import PeerId, VersionId


@dataclass
class Record:
    """adoptions: when a state first adopted a version; proofs: when a peer first held a version's proof; reached:
    seconds from then until a peer that was there and connected had it as its own; failed_rounds: (parent, round) ->
    how it ended, for the first peer that saw it end; versions_of: by round, those that anybody adopted."""

    adoptions: dict[VersionId, float] = field(default_factory=dict)
    proofs: dict[VersionId, float] = field(default_factory=dict)
    reached: list[float] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    failed_rounds: dict[tuple[VersionId, int], str] = field(default_factory=dict)
    versions_of: dict[int, set[VersionId]] = field(default_factory=dict)
    misbehaved: set[PeerId] = field(default_factory=set)
    backlog: int = 0
    refused: int = 0
    transfers: int = 0
    turned_away: int = 0
    questions: int = 0
    went: int = 0
    came: int = 0

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(self.failed_rounds.values())


@dataclass(frozen=True)
class Spread:
    """Seconds, or messages, as peers had them."""

    half: float
    most: float
    all: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """most: 99 %."""
        if not values:
            return cls(0.0, 0.0, 0.0)
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(ordered[last // 2], ordered[int(last * 0.99)], ordered[-1])


@dataclass(frozen=True)
class Outcome:
    """reach_seconds: from a version's proof to each peer; messages_per_minute: that one peer sends; forks: parents with
    two adopted children; merged, left_out, late, waiting: the honest patches, by what became of them; happened: events
    that were simulated. violations: a sentence each, none when all held."""

    scenario: str
    seed: int
    nodes: int
    hours: float
    versions: int
    head: str
    rejected: int
    abandoned: int
    forks: int
    patches: int
    merged: int
    left_out: int
    late: int
    waiting: int
    reach_seconds: Spread
    messages_per_minute: Spread
    backlog: int
    transfers: int
    turned_away: int
    questions: int
    refused: int
    misbehaved: int
    went: int
    came: int
    moves: int
    longest_gap: float
    happened: int
    violations: tuple[str, ...]
