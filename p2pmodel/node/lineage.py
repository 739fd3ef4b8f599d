"""One model lineage as a home knows it: its Manifest, its records, and the versions that these prove.

A view of the store that any process of the home may open; nothing here imports torch. What is not yet known to be valid
enters through `p2pmodel.node.intake`.
"""

from collections.abc import Iterator

from p2pmodel.domain.errors import InvalidInput, NotFound
from p2pmodel.domain.ids import Digest, ModelId, PatchId, PeerId, VersionId, short
from p2pmodel.domain.model import BlobRef, Manifest
from p2pmodel.domain.patch import Patch
from p2pmodel.domain.swarm import LineageOffer
from p2pmodel.domain.version import BASE_NUMBER, Candidate, Verdict, Version, VersionNumber
from p2pmodel.logic.lineage import assemble
from p2pmodel.store.home import Home
from p2pmodel.store.index import RecordRow
from p2pmodel.wire import records
from p2pmodel.wire.signing import RECORD_OVERHEAD


class Lineage:
    def __init__(self, home: Home, model: ModelId) -> None:
        """Raises NotFound when the home does not hold the model's Manifest."""
        self.home, self.model = home, model
        record = home.objects.load(model, records.MAX_MANIFEST_BYTES + RECORD_OVERHEAD)
        self.record = BlobRef(model, len(record))
        self.manifest: Manifest = records.open_manifest(record)[0]
        self.patches: dict[PatchId, Patch] = {}
        self.candidates: dict[VersionId, Candidate] = {}
        self.proposers: dict[VersionId, PeerId] = {}
        self.verdicts: dict[Digest, Verdict] = {}
        self.versions: tuple[Version, ...] = ()
        self._read: set[Digest] = set()
        self.refresh()

    @classmethod
    def create(cls, home: Home, record: bytes) -> "Lineage":
        """Takes a signed Manifest into the home. Raises Rejected when it is none."""
        records.open_manifest(record)
        ref = home.objects.put(record)
        home.index.add(RecordRow("manifest", ref.digest, ref, 0, 0.0))
        return cls(home, ref.digest)

    def refresh(self) -> None:
        """Takes in the records that have come since, by whatever process of this home, and proves the versions anew."""
        new = [row for row in self.home.index.records(self.model) if row.record.digest not in self._read]
        for row in new:
            self._read.add(row.record.digest)
            raw = self.home.objects.load(row.record.digest)
            if row.kind == "patch":
                self.patches[row.record.digest] = records.open_patch(raw)
            elif row.kind == "candidate":
                candidate, proposer, version = records.open_candidate(raw)
                self.candidates[version], self.proposers[version] = candidate, proposer
            elif row.kind == "verdict":
                self.verdicts[row.record.digest] = records.open_verdict(raw)
        if any(row.kind in ("candidate", "verdict") for row in new):
            self.versions = assemble(self.manifest, self.model, self.candidates, self.verdicts.values())

    def knows(self, record: Digest) -> bool:
        return record in self._read

    def known_records(self) -> tuple[Digest, ...]:
        return tuple(self._read - {self.model})

    def inventory(self) -> list[tuple[str, BlobRef]]:
        """(kind, record) of all that peers may want."""
        return [(row.kind, row.record) for row in self.home.index.records(self.model) if row.kind != "manifest"]

    @property
    def head(self) -> VersionId:
        """The newest proven version; the model id while there is none but the base."""
        return self.versions[-1].id if self.versions else self.model

    @property
    def served_head(self) -> VersionId:
        """The newest version whose values this home holds as well, as its node has noted it."""
        return VersionId(Digest(self.home.refs.get(f"models/{self.model}/head") or self.model))

    def number(self, version: VersionId) -> VersionNumber:
        """Raises NotFound when the version is none that was adopted here."""
        return BASE_NUMBER if version == self.model else self.version(version).candidate.number

    def version(self, version: VersionId) -> Version:
        for known in self.versions:
            if known.id == version:
                return known
        raise NotFound(f"Version {short(version)} of {self.manifest.name} is not known here.", "See: p2pmodel log")

    def offer(self) -> LineageOffer:
        return LineageOffer(self.model, self.manifest.name, self.record, self.head)

    def find_version(self, text: str) -> VersionId:
        """By number (`1.0.2`), by id or the beginning of one, `base` or `head`. Raises NotFound."""
        if text == "head":
            return self.head
        if text == "base":
            return self.model
        every = {self.model: BASE_NUMBER, **{v.id: v.candidate.number for v in self.versions}}
        try:
            wanted = VersionNumber.parse(text)
        except ValueError:
            found = [v for v in every if len(text) >= 4 and v.startswith(text)]
        else:
            found = [v for v, number in every.items() if number == wanted]
        if len(found) != 1:
            known = ", ".join(str(n) for n in every.values())
            raise NotFound(f"{self.manifest.name} has no version {text}.", f"It has: {known}.")
        return found[0]

    def find_patch(self, text: str) -> PatchId:
        """By id or the beginning of one. Raises NotFound."""
        found = [p for p in self.patches if len(text) >= 4 and p.startswith(text)]
        if len(found) != 1:
            what = "is not known here" if not found else "could be several patches"
            raise NotFound(f"Patch {text} {what}.", "See: p2pmodel patch list")
        return found[0]

    def result(self, version: VersionId) -> BlobRef | None:
        """The blob with the values of all slots at the version; None for the base, whose slots are neutral."""
        return None if version == self.model else self.version(version).candidate.result

    def blobs(self) -> Iterator[BlobRef]:
        """All that the lineage's records refer to."""
        yield self.manifest.exam
        for patch in self.patches.values():
            yield from (patch.adapter, patch.fisher)
        for candidate in self.candidates.values():
            yield candidate.result


def known_lineages(home: Home) -> list[Lineage]:
    return [Lineage(home, model) for model in home.index.models()]


def find_lineage(home: Home, text: str) -> Lineage:
    """By name, id, or the beginning of one, among those that the home knows. Raises NotFound, or InvalidInput when
    several have the name."""
    found = [
        x for x in known_lineages(home) if x.manifest.name == text or (len(text) >= 4 and x.model.startswith(text))
    ]
    if not found:
        raise NotFound(
            f"No model {text!r} is known here.", "See: p2pmodel model list; or name the folder of a checkpoint."
        )
    if len(found) > 1:
        ids = ", ".join(short(x.model) for x in found)
        raise InvalidInput(f"Several models are called {text!r}: {ids}.", "Use the id.")
    return found[0]
