"""The lineages of a home that have come of each other, as far as their records are here; without torch."""

from p2pmodel.domain.errors import InvalidInput, NotFound
from p2pmodel.domain.ids import ModelId, PatchId, VersionId, short
from p2pmodel.domain.model import Origin
from p2pmodel.domain.patch import Patch
from p2pmodel.logic.ancestry import Parting, Point, Strand, merged, part
from p2pmodel.node.lineages.lineage import Lineage, known_lineages
from p2pmodel.store.home import Home


class Family:
    """All lineages that a home knows."""

    def __init__(self, home: Home) -> None:
        self.lineages = {lineage.model: lineage for lineage in known_lineages(home)}
        self._strands = {model: Strand(lineage.founding, lineage.versions) for model, lineage in self.lineages.items()}

    def over_one_base(self, lineage: Lineage) -> list[Lineage]:
        """With the lineage itself, which comes first, then by name."""
        found = [x for x in self.lineages.values() if x.founding.files == lineage.founding.files]
        return sorted(found, key=lambda x: (x.model != lineage.model, x.manifest.name, x.model))

    def branches(self, lineage: Lineage) -> list[tuple[VersionId, Lineage]]:
        """Those that begin with a version of the lineage, with which one."""
        origins = ((x.founding.origin, x) for x in self.lineages.values())
        return [(origin.version, x) for origin, x in origins if origin is not None and origin.model == lineage.model]

    def parting(self, mine: Lineage, other: Lineage) -> Parting | None:
        """Of their heads; None as long as nothing is known here that they have in common."""
        return part(self._strands, _head(mine), _head(other))

    def name(self, model: ModelId) -> str:
        """Of its Manifest, or the beginning of its id where it is not known here."""
        return self.lineages[model].manifest.name if model in self.lineages else short(model)

    def describe(self, origin: Origin) -> str:
        """Such as `base-model 1.0.2 (ab12…)`."""
        return f"{self.name(origin.model)} {origin.number} ({short(origin.version)})"

    def merged(self, lineage: Lineage, version: VersionId) -> list[Patch]:
        """Of all that a version has come of, the patches that are here, by id."""
        known = {patch: noun for x in self.lineages.values() for patch, noun in x.patches.items()}
        ids = merged(self._strands, Point(lineage.model, version))
        return [known[patch] for patch in sorted(ids) if patch in known]

    def between(self, lineage: Lineage, at: Point) -> list[tuple[Lineage, PatchId]]:
        """The patches that make the difference between a version and the lineage's head, by id, each with the lineage
        that it is of. Raises NotFound when one of them, or its tensors, is not here."""
        ids = sorted(merged(self._strands, _head(lineage)) ^ merged(self._strands, at))
        owners = {patch: x for x in self.lineages.values() for patch, noun in x.patches.items() if _is_whole(x, noun)}
        missing = [patch for patch in ids if patch not in owners]
        if missing:
            more = f", nor are {len(missing) - 1} more" if len(missing) > 1 else ""
            raise NotFound(
                f"Patch {short(missing[0])}, which {lineage.manifest.name} has merged, is not on this machine{more}.",
                f"A node of this home fetches them: p2pmodel join --layers none --model {short(lineage.model)}",
            )
        return [(owners[patch], patch) for patch in ids]


def demand_one_base(mine: Lineage, other: Lineage) -> None:
    """Raises InvalidInput."""
    if mine.model == other.model:
        raise InvalidInput(f"{mine.manifest.name} can't be merged into itself.", "Name another one with --model.")
    if mine.founding.files != other.founding.files:
        raise InvalidInput(
            f"{other.manifest.name} has another base than {mine.manifest.name}.",
            "Move single patches over, with: p2pmodel rebase PATCH --model NAME",
        )


def _head(lineage: Lineage) -> Point:
    return Point(lineage.model, lineage.head)


def _is_whole(lineage: Lineage, patch: Patch) -> bool:
    return all(lineage.home.objects.has(ref.digest) for ref in patch.blobs)
