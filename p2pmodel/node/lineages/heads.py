"""A lineage's latest heads, as those that decide what to serve look at them."""

import time

from p2pmodel.domain.ids import VersionId
from p2pmodel.logic.keeping_up import Heads
from p2pmodel.node.lineages.lineage import Lineage


def first_heads(lineage: Lineage) -> Heads:
    """Of a node that begins: its head's parent may still be what others serve."""
    head = lineage.served_head
    candidate = lineage.candidates.get(head)
    return next_heads(Heads.begin(candidate.parent if candidate else head, time.monotonic()), lineage)


def next_heads(heads: Heads, lineage: Lineage) -> Heads:
    """The same a while later."""
    head = lineage.served_head
    return heads.after(head, time.monotonic(), _ahead(lineage, head))


def _ahead(lineage: Lineage, head: VersionId) -> tuple[VersionId, ...]:
    chain = [lineage.model, *(version.id for version in lineage.versions)]
    return tuple(chain[chain.index(head) + 1 :]) if head in chain else ()
