"""What the status page shows of experts: those of a mixture, and who hosts them apart from their layers; and what a
version's modular experts are chosen for, where that was noted in the home."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from p2pmodel.domain.experts import ExpertLease, describe, rate_at
from p2pmodel.domain.ids import VersionId
from p2pmodel.logic.experts import asked_of, hosts_of
from p2pmodel.node.lineages.expert_shares import noted_shares
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.watching.lookout import Lookout

MOST_LISTED = 500

Named = Callable[[VersionId], dict[str, str]]


class ExpertView:
    def __init__(self, lineage: Lineage, leases: Callable[[], Awaitable[Sequence[ExpertLease]]], named: Named) -> None:
        """leases: asks the swarm; named: a version as the page has it."""
        self._lineage, self._leases, self._named = lineage, leases, named
        self._lookout = Lookout(self._read)

    async def view(self) -> dict[str, Any]:
        """Raises Unreachable, StorageError."""
        (leases,) = await self._lookout.look()
        return {"hosted": hosted_view(leases, self._lineage.manifest.layers, self._named), "shares": self._shares()}

    async def _read(self) -> tuple[Sequence[ExpertLease]]:
        return (await self._leases(),)

    def _shares(self) -> dict[str, Any] | None:
        noted = noted_shares(self._lineage)
        if noted is None:
            return None
        number, shares = noted
        rows = [{"text": name, "shares": list(row)} for name, row in shares.rows]
        return {"number": number, "names": list(shares.names), "rows": rows}


def hosted_view(leases: Sequence[ExpertLease], layers: int, named: Named) -> dict[str, Any] | None:
    """None where nobody hosts any. layers: of the model. hosts, asked: by expert; asked: rows a second in a layer."""
    leases = [lease for lease in leases if lease.span.start < layers]
    if not leases:
        return None
    return {
        "hosts": list(hosts_of(leases, layers)),
        "asked": [round(rate, 2) for rate in asked_of(leases, layers)],
        "leases": [
            {
                "peer": lease.peer,
                "start": lease.span.start,
                "end": lease.span.end,
                "experts": describe(lease.experts),
                "coming": describe(lease.coming),
                "going": describe(lease.going),
                "asked": round(sum(map(rate_at, lease.loads)), 2) if lease.loads else None,
                "pair_seconds": lease.pair_seconds,
                "dtype": lease.dtype,
                "versions": [named(version) for version in lease.versions],
            }
            for lease in sorted(leases, key=lambda x: (x.span, x.experts, x.peer))[:MOST_LISTED]
        ],
    }
