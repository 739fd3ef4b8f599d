"""What a simulation is of, read from TOML: the swarm, its world, what goes wrong, and what has to hold nevertheless."""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from p2pmodel.domain.errors import InvalidInput, NotFound
from p2pmodel.domain.model import MAX_MAINTAINERS, Schedule

T = TypeVar("T")
Range = tuple[float, float]
MAX_NODES = 100_000
MAX_HOURS = 24.0 * 366


@dataclass(frozen=True)
class Population:
    """threshold: 0 for more than half; contributors: of the nodes, how many train; they come within `join_seconds`."""

    nodes: int
    maintainers: int = 5
    threshold: int = 0
    contributors: int = 10
    join_seconds: float = 10.0

    def __post_init__(self) -> None:
        _demand(2 <= self.nodes <= MAX_NODES, f"nodes has to be 2 to {MAX_NODES}")
        _demand(
            1 <= self.maintainers <= min(self.nodes, MAX_MAINTAINERS), "maintainers has to be 1 to nodes, 64 at most"
        )
        _demand(0 <= self.threshold <= self.maintainers, "threshold has to be 0 to maintainers")
        most = self.nodes - self.maintainers
        _demand(0 <= self.contributors <= most, "contributors has to be 0 to nodes less maintainers")
        _demand(self.join_seconds >= 0, "join_seconds must not be negative")

    @property
    def accepting(self) -> int:
        return self.threshold or self.maintainers // 2 + 1


@dataclass(frozen=True)
class Network:
    """delay_seconds: one way, between the nearest and the farthest peers; each message takes up to `jitter` more, as a
    share; loss: of gossip's messages from peer to peer; failure: of transfers and questions; bytes_per_second: of one
    transfer; uploads: how many a peer serves at once."""

    delay_seconds: Range = (0.01, 0.15)
    jitter: float = 0.5
    loss: float = 0.0
    failure: float = 0.0
    bytes_per_second: float = 2e6
    uploads: int = 64

    def __post_init__(self) -> None:
        _demand_range(self.delay_seconds, "delay_seconds")
        _demand(self.jitter >= 0, "jitter must not be negative")
        _demand(0 <= self.loss < 1, "loss has to be a share below 1")
        _demand(0 <= self.failure < 1, "failure has to be a share below 1")
        _demand(self.bytes_per_second > 0, "bytes_per_second has to be positive")
        _demand(self.uploads >= 1, "uploads has to be at least 1")


@dataclass(frozen=True)
class Work:
    """How long it takes; doubt: the share of good candidates that a maintainer rejects; patch_bytes: of a patch."""

    train_seconds: Range = (60.0, 900.0)
    propose_seconds: Range = (10.0, 60.0)
    examine_seconds: Range = (10.0, 60.0)
    failure: float = 0.0
    doubt: float = 0.0
    patch_bytes: int = 20_000

    def __post_init__(self) -> None:
        for name in ("train_seconds", "propose_seconds", "examine_seconds"):
            _demand_range(getattr(self, name), name)
        _demand(0 <= self.failure < 1, "failure has to be a share below 1")
        _demand(0 <= self.doubt <= 1, "doubt has to be a share")
        _demand(self.patch_bytes > 0, "patch_bytes has to be positive")


@dataclass(frozen=True)
class Clocks:
    """skew_seconds: the most that a peer's clock is off, either way; drift: the most that it runs fast or slow."""

    skew_seconds: float = 0.0
    drift: float = 0.0

    def __post_init__(self) -> None:
        _demand(self.skew_seconds >= 0, "skew_seconds must not be negative")
        _demand(0 <= self.drift < 0.5, "drift has to be a share below 0.5")


@dataclass(frozen=True)
class Churn:
    """Peers go without a word after a mean life. After `away_seconds` one comes back as it was, or, of a share
    `replaced`, a new one with nothing comes instead. maintainers: whether they go too; they always come back."""

    mean_life_hours: float
    away_seconds: Range = (60.0, 1800.0)
    replaced: float = 0.5
    maintainers: bool = True

    def __post_init__(self) -> None:
        _demand(self.mean_life_hours > 0, "mean_life_hours has to be positive")
        _demand_range(self.away_seconds, "away_seconds")
        _demand(0 <= self.replaced <= 1, "replaced has to be a share")


@dataclass(frozen=True)
class Partition:
    """From a minute on, for some minutes, a share of the nodes and that many maintainers cannot reach the others."""

    at_minutes: float
    minutes: float
    share: float
    maintainers: int = 0

    def __post_init__(self) -> None:
        _demand(self.at_minutes >= 0, "at_minutes must not be negative")
        _demand(self.minutes > 0, "minutes has to be positive")
        _demand(0 < self.share < 1, "share has to be between 0 and 1")
        _demand(self.maintainers >= 0, "maintainers must not be negative")


@dataclass(frozen=True)
class Liars:
    """contributors: the share of them whose patches make the model worse; maintainers: how many propose twice and sign
    everything; spoilers: how many publish a candidate with false values as soon as a round opens; leapers: how many
    propose for rounds far ahead; amenders: how many propose one amendment after another, all counted from the last
    maintainer, so that one may do several of these; forgers: peers that announce forged records and such as do not
    exist, `forgeries_per_hour` each."""

    contributors: float = 0.0
    maintainers: int = 0
    spoilers: int = 0
    leapers: int = 0
    amenders: int = 0
    forgers: int = 0
    forgeries_per_hour: float = 60.0

    def __post_init__(self) -> None:
        _demand(0 <= self.contributors <= 1, "contributors has to be a share")
        for name in ("maintainers", "spoilers", "leapers", "amenders"):
            _demand(getattr(self, name) >= 0, f"{name} must not be negative")
        _demand(self.forgers >= 0, "forgers must not be negative")
        _demand(self.forgeries_per_hour > 0, "forgeries_per_hour has to be positive")


@dataclass(frozen=True)
class Hosting:
    """Peers that host layers beside all this, each as many as it has room for; they live as long as `churn` says."""

    nodes: int
    layers: int = 80
    capacity: Range = (4.0, 12.0)
    gap_seconds: float = 60.0

    def __post_init__(self) -> None:
        _demand(1 <= self.nodes <= MAX_NODES, f"nodes has to be 1 to {MAX_NODES}")
        _demand(1 <= self.layers <= 10_000, "layers is out of range")
        _demand_range(self.capacity, "capacity")
        _demand(self.capacity[0] >= 1, "capacity has to begin at 1 or more")
        _demand(self.gap_seconds > 0, "gap_seconds has to be positive")


@dataclass(frozen=True)
class Limits:
    """What has to hold. reach_seconds: from a version's proof until every honest node that is there and connected has
    it as its own; backlog: entries of one node; messages_per_second: that the busiest node sends, in the mean of its
    time; versions: at least so many; forks: at most so many parents with two children; merged: the share of honest
    patches, of those on a version that has a successor."""

    reach_seconds: float = 60.0
    backlog: int = 4096
    messages_per_second: float = 50.0
    versions: int = 1
    forks: int = 0
    merged: float = 0.0

    def __post_init__(self) -> None:
        _demand(self.reach_seconds > 0, "reach_seconds has to be positive")
        _demand(self.backlog >= 1, "backlog has to be at least 1")
        _demand(self.messages_per_second > 0, "messages_per_second has to be positive")
        _demand(self.versions >= 0, "versions must not be negative")
        _demand(self.forks >= 0, "forks must not be negative")
        _demand(0 <= self.merged <= 1, "merged has to be a share")


@dataclass(frozen=True)
class Scenario:
    """settle_minutes: at the end, without churn, partitions, lies or new patches, so that what is under way arrives."""

    name: str
    about: str
    hours: float
    swarm: Population
    settle_minutes: float = 30.0
    schedule: Schedule = field(default_factory=Schedule)
    network: Network = field(default_factory=Network)
    work: Work = field(default_factory=Work)
    clocks: Clocks = field(default_factory=Clocks)
    churn: Churn | None = None
    partitions: tuple[Partition, ...] = ()
    liars: Liars = field(default_factory=Liars)
    hosting: Hosting | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        _demand(bool(self.name), "name is empty")
        _demand(0 < self.hours <= MAX_HOURS, "hours is out of range")
        _demand(0 < 60 * self.hours > self.settle_minutes >= 0, "settle_minutes has to be less than all the time")
        swarm, liars = self.swarm, self.liars
        rest = swarm.nodes - swarm.maintainers - swarm.contributors
        for name in ("maintainers", "spoilers", "leapers", "amenders"):
            _demand(getattr(liars, name) <= swarm.maintainers, f"liars.{name} is more than there are maintainers")
        _demand(liars.forgers <= rest, "liars.forgers is more than there are nodes that neither decide nor train")
        end = 0.0
        for partition in self.partitions:
            _demand(partition.maintainers <= swarm.maintainers, "a partition has more maintainers than there are")
            _demand(partition.at_minutes >= end, "partitions must not overlap, and have to be in order")
            end = partition.at_minutes + partition.minutes
        _demand(end <= 60 * self.hours - self.settle_minutes, "the last partition has to end before it all settles")

    def changed(self, nodes: int | None = None, hours: float | None = None) -> "Scenario":
        """With other figures. Raises InvalidInput when they do not fit the rest."""
        try:
            swarm = self.swarm if nodes is None else replace(self.swarm, nodes=nodes)
            return replace(self, swarm=swarm, hours=self.hours if hours is None else hours)
        except ValueError as error:
            raise InvalidInput(f"The scenario {self.name} cannot be changed like that: {error}.") from None


def bundled() -> dict[str, Scenario]:
    """Those that come with the package, by name, sorted."""
    files = (
        file for file in resources.files(__package__).joinpath("scenarios").iterdir() if file.name.endswith(".toml")
    )
    return {
        file.name.removesuffix(".toml"): parse(file.read_text(encoding="utf-8"), file.name)
        for file in sorted(files, key=lambda file: file.name)
    }


def load(text: str) -> Scenario:
    """A file, or one of those that come with the package. Raises NotFound, InvalidInput."""
    if not text.endswith(".toml"):
        known = bundled()
        if text not in known:
            raise NotFound(
                f"There is no scenario {text[:64]!r}.", f"There are {', '.join(known)}; or name a .toml file."
            )
        return known[text]
    path = Path(text)
    try:
        return parse(path.read_text(encoding="utf-8"), path.name)
    except FileNotFoundError:
        raise NotFound(f"There is no file {text}.", "See: p2pmodel sim --list") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{text} cannot be read: {error}.") from None


def parse(text: str, where: str) -> Scenario:
    """where: what the text is called in the sentence that says what is wrong. Raises InvalidInput."""
    try:
        return _build(Scenario, tomllib.loads(text), "")
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{where} is no TOML: {error}.") from None
    except ValueError as error:
        raise InvalidInput(f"{where}: {error}.", "docs/simulation.md has all keys.") from None


def _build(kind: type[T], table: Mapping[str, Any], path: str) -> T:
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for key in table:
        _demand(key in known, f"{path}{key} is no key; there are {', '.join(known)}")
    for name, its in known.items():
        needed = its.default is MISSING and its.default_factory is MISSING
        _demand(name in table or not needed, f"{path}{name} is missing")
    values = {key: _value(hints[key], value, path + key) for key, value in table.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{path}{error}") from None


def _value(hint: Any, value: Any, path: str) -> Any:
    if get_origin(hint) is UnionType:
        hint = next(arm for arm in get_args(hint) if arm is not type(None))
    if get_origin(hint) is tuple and get_args(hint)[-1] is ...:
        _demand(isinstance(value, list), f"{path} has to be an array of tables")
        return tuple(_value(get_args(hint)[0], item, f"{path}[{at}]") for at, item in enumerate(value))
    if get_origin(hint) is tuple:
        pair = isinstance(value, list) and len(value) == 2
        _demand(pair and all(_is(float, item) for item in value), f"{path} has to be two numbers, [least, most]")
        return (float(value[0]), float(value[1]))
    if hint in (int, float, bool, str):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        _demand(_is(hint, value), f"{path} has to be {words[hint]}, not {str(value)[:32]!r}")
        return float(value) if hint is float else value
    _demand(isinstance(value, dict), f"{path} has to be a table")
    return _build(hint, value, f"{path}.")


def _is(kind: type, value: object) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) and value == value if kind is float else isinstance(value, kind)


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _demand_range(pair: Range, name: str) -> None:
    _demand(0 <= pair[0] <= pair[1] < float("inf"), f"{name} has to be [least, most], neither negative")
