"""Merging patches whose blobs are here: for a round, and for anybody who wants to see what would come of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import PatchId, short
from p2pmodel.domain.model import MergeSpec
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import read_change, read_masses
from p2pmodel.tensors import control, variates
from p2pmodel.tensors.changes import Change
from p2pmodel.tensors.merging import Contribution, get_strategy
from p2pmodel.tensors.variates import Variate


@dataclass(frozen=True)
class Source:
    """A patch, and where its blobs come from when they are wanted: they are never all held at a time. weight: λ."""

    id: PatchId
    kind: str
    adapter: Callable[[], bytes]
    fisher: Callable[[], bytes]
    control: Callable[[], bytes] | None
    weight: float = 1.0

    def change(self, lineage: Lineage) -> Change:
        return read_change(lineage, self.kind, self.adapter())


def stored(lineage: Lineage, patch: PatchId, weight: float = 1.0) -> Source:
    """Of a patch in the home. Raises Rejected("patch") when it is not known here."""
    if patch not in lineage.patches:
        raise Rejected("patch", f"The candidate names patch {short(patch)}, which is not known here.")
    header, limit = lineage.patches[patch], lineage.manifest.limits.max_patch_bytes

    def load(digest: str) -> Callable[[], bytes]:
        return lambda: lineage.home.objects.load(digest, limit)  # type: ignore[arg-type]

    variate = None if header.control is None else load(header.control.digest)
    return Source(patch, header.kind, load(header.adapter.digest), load(header.fisher.digest), variate, weight)


def combine(
    lineage: Lineage, parent: Mapping[str, Tensor], sources: Sequence[Source], spec: MergeSpec
) -> dict[str, Tensor]:
    """δ̄ by slot, float64. sources: sorted by id. Raises Rejected, NotFound."""

    def contributions() -> Iterator[Contribution]:
        for source in sources:
            change = source.change(lineage)
            masses = read_masses(lineage, source.kind, change, source.fisher())
            yield Contribution(source.id, change.values, masses, source.weight, change.relative)

    return get_strategy(spec.strategy).combine(parent, contributions, dict(spec.parameters))


def mean_control(lineage: Lineage, sources: Sequence[Source]) -> bytes | None:
    """The blob of the round's mean control variate; None where no patch has one that counts. Raises Rejected."""
    limit = lineage.manifest.limits.max_patch_bytes

    def given() -> Iterator[Variate]:
        for source in sources:
            if source.control is not None and source.kind in variates.KINDS:
                adapter = source.adapter()
                places = control.places(adapter, read_change(lineage, source.kind, adapter), limit)
                gradient = control.read(source.control(), places, limit)
                yield Variate(source.id, source.kind, gradient, source.weight)

    return variates.write_mean(given, lineage.manifest.kinds, lineage.manifest.slots)
