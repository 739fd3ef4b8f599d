"""Modular experts: small adapters that layers carry in pools, each with a row of the layer's router.

A Manifest whose kinds hold `expert@1` has one pool slot a layer, `expert:<layer>.experts`. It is no tensor but a rule:
a version may have slots `expert:<layer>.experts.<name>.<part>` there, for experts of any name. Its shape [2R + 2, H]
says how many values one expert may have in that layer: R is the highest rank, H the width of the hidden state.

    down    [r, H]  from the hidden state into the bottleneck
    up      [r, H]  and back, added to the hidden state
    router  [H]     what the mean hidden state of an example is compared with
    gate    [2]     scale and bias of that comparison

So that what a version has can be proven from its record alone, the record names its experts; slots follow from that.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from p2pmodel.domain.model import Slot

KIND, PREFIX = "expert@1", "expert:"
DOWN, UP, ROUTER, GATE = PARTS = ("down", "up", "router", "gate")
ROUTING = (ROUTER, GATE)
MAX_EXPERTS = 128
NONE = "none"
"""What the layer as it is is called among experts."""
MAX_RANK = 1 << 16
DEFAULT_MAX_RANK = 32
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_POOL = ".experts"


@dataclass(frozen=True, order=True)
class Expert:
    """rank: of its bottleneck, the same in every layer."""

    name: str
    rank: int

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ValueError("an expert's name has 1 to 32 small letters, digits, '-' and '_'")
        if not 1 <= self.rank <= MAX_RANK:
            raise ValueError("an expert's rank is out of range")


Experts = tuple[Expert, ...]
"""Of a version: unique and sorted by name."""


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and text != NONE


def name_like(text: str) -> str:
    """A name for an expert that is as near to the text as may be; empty when nothing of it can be used."""
    return re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-_")[:32]


def check_experts(experts: Experts) -> None:
    """Raises ValueError."""
    names = [expert.name for expert in experts]
    if names != sorted(set(names)) or len(names) > MAX_EXPERTS:
        raise ValueError(f"a version's experts have to be unique, sorted by name, and at most {MAX_EXPERTS}")


def pool_slot(layer: str, width: int, max_rank: int = DEFAULT_MAX_RANK) -> Slot:
    """layer: its path below the base model."""
    return Slot(f"{PREFIX}{layer}{_POOL}", (2 * max_rank + 2, width), "float32")


def is_pool(slot: Slot) -> bool:
    return slot.name.startswith(PREFIX)


def max_rank(pool: Slot) -> int:
    return pool.shape[0] // 2 - 1


def check_pools(slots: Iterable[Slot]) -> None:
    """Of a Manifest. Raises ValueError for a pool that has no room for an expert of any rank."""
    for pool in filter(is_pool, slots):
        if not pool.name.endswith(_POOL) or len(pool.shape) != 2 or not 1 <= max_rank(pool) <= MAX_RANK:
            raise ValueError(f"slot {pool.name[:128]} is no pool of experts")


@dataclass(frozen=True)
class Place:
    """Where a slot of an expert is. layer: the path of the layer that the pool is in."""

    layer: str
    expert: str
    part: str


def place_of(name: str) -> Place | None:
    """None for the name of anything else."""
    pool, _, part = name.rpartition(".")
    pool, _, expert = pool.rpartition(".")
    if not pool.startswith(PREFIX) or not pool.endswith(_POOL) or part not in PARTS or not is_name(expert):
        return None
    return Place(pool.removeprefix(PREFIX).removesuffix(_POOL), expert, part)


def slots_of_expert(pools: Iterable[Slot], expert: Expert) -> tuple[Slot, ...]:
    """In every pool, all parts."""
    found = []
    for pool in pools:
        width = pool.shape[1]
        shapes = {DOWN: (expert.rank, width), UP: (expert.rank, width), ROUTER: (width,), GATE: (2,)}
        found += [Slot(f"{pool.name}.{expert.name}.{part}", shape, "float32") for part, shape in shapes.items()]
    return tuple(found)


def slots_at(slots: Sequence[Slot], experts: Experts) -> tuple[Slot, ...]:
    """The slots of a version, sorted by name: those of the Manifest, with the experts' own in place of the pools."""
    pools = [slot for slot in slots if is_pool(slot)]
    own = [slot for slot in slots if not is_pool(slot)]
    own += [slot for expert in experts for slot in slots_of_expert(pools, expert)]
    return tuple(sorted(own, key=lambda slot: slot.name))


def experts_in(shapes: Mapping[str, tuple[int, ...]]) -> Experts:
    """Those of which the slots hold an adapter, by what the first one says of its rank."""
    ranks: dict[str, int] = {}
    for name, shape in shapes.items():
        place = place_of(name)
        if place is not None and place.part == DOWN:
            ranks.setdefault(place.expert, shape[0])
    return tuple(sorted(Expert(name, rank) for name, rank in ranks.items()))


def removed(now: Experts, before: Experts) -> tuple[str, ...]:
    """Names of those that are gone."""
    return tuple(expert.name for expert in before if expert not in now)


def united(before: Experts, new: Iterable[Expert]) -> Experts:
    """With those of `new` that are not there yet, by name."""
    known = {expert.name: expert for expert in (*new, *before)}
    return tuple(sorted(known.values()))
