"""One model lineage as a home knows it: its Manifest, its records, and the versions that these prove.

A view of the store that any process of the home may open; nothing here imports torch. What is not yet known to be valid
enters through `p2pmodel.node.lineages.intake`.
"""

import logging
from collections.abc import Iterator

from p2pmodel.domain.errors import InvalidInput, NotFound, Rejected, StorageError
from p2pmodel.domain.ids import Digest, ModelId, PatchId, PeerId, VersionId, abbreviates, short
from p2pmodel.domain.model import BlobRef, Limits, Manifest, Slot
from p2pmodel.domain.modular import Expert, Experts, slots_at
from p2pmodel.domain.patch import Patch
from p2pmodel.domain.swarm import LineageOffer
from p2pmodel.domain.version import BASE_NUMBER, Candidate, Verdict, Version, VersionNumber
from p2pmodel.logic.lineage import assemble, history, in_force, place_in_plan
from p2pmodel.node.lineages.notes import Notes
from p2pmodel.store.home import Home
from p2pmodel.store.index import RecordRow
from p2pmodel.wire import records
from p2pmodel.wire.signing import RECORD_OVERHEAD

log = logging.getLogger(__name__)


class Lineage:
    def __init__(self, home: Home, model: ModelId) -> None:
        """Raises NotFound when the home does not hold the model's Manifest."""
        self.home, self.model = home, model
        record = home.objects.load(model, records.MAX_MANIFEST_BYTES + RECORD_OVERHEAD)
        self.record = BlobRef(model, len(record))
        self.founding: Manifest = records.open_manifest(record)[0]
        self.manifest = self.founding
        self.notes = Notes(home.refs, model, self.founding.name)
        self.patches: dict[PatchId, Patch] = {}
        self.candidates: dict[VersionId, Candidate] = {}
        self.proposers: dict[VersionId, tuple[PeerId, ...]] = {}
        """All that have proposed a version, as their records came."""
        self.heard: dict[VersionId, float] = {}
        """When the first candidate for a version came here, in seconds since the epoch."""
        self.verdicts: dict[Digest, Verdict] = {}
        self.versions: tuple[Version, ...] = ()
        self._read: set[Digest] = set()
        self._candidate_of: dict[Digest, VersionId] = {}
        self.refresh()

    @classmethod
    def create(cls, home: Home, record: bytes) -> "Lineage":
        """Takes a signed Manifest into the home. Raises Rejected when it is none."""
        records.open_manifest(record)
        ref = home.objects.put(record)
        home.index.add(RecordRow("manifest", ref.digest, ref, 0, 0.0))
        return cls(home, ref.digest)

    def refresh(self) -> None:
        """Takes in the records that have come since, by whatever process of this home, and proves the versions anew. A
        record whose bytes are lost does not count as known, so that peers bring it again.

        Raises StorageError for what cannot be read now, when all else has been taken in; it is tried again next time.
        """
        new = [row for row in self.home.index.records(self.model) if row.record.digest not in self._read]
        failed: StorageError | None = None
        moved = False
        for row in new:
            try:
                self._read_record(row)
            except NotFound:
                log.debug("the bytes of %s %s are not here", row.kind, row.record.digest)
                continue
            except StorageError as error:
                failed = failed or error
                continue
            except Rejected as error:
                log.warning("%s %s of this home cannot be used: %s", row.kind, short(row.record.digest), error.message)
            self._read.add(row.record.digest)
            moved = moved or row.kind in ("candidate", "verdict")
        if moved:
            self.versions = assemble(self.founding, self.model, self.candidates, self.verdicts.values())
            self.manifest = in_force(self.founding, self.versions)
        if failed is not None:
            raise failed

    def _read_record(self, row: RecordRow) -> None:
        raw = self.home.objects.load(row.record.digest)
        if row.kind == "patch":  # of a size that the Manifest allowed when it came
            self.patches[row.record.digest] = records.open_patch(raw, len(raw))
        elif row.kind == "candidate":
            candidate, proposer, version = records.open_candidate(raw)
            self.candidates[version] = candidate
            self.proposers[version] = (*self.proposers.get(version, ()), proposer)
            self.heard.setdefault(version, row.seen)
            self._candidate_of[row.record.digest] = version
        elif row.kind == "verdict":
            self.verdicts[row.record.digest] = records.open_verdict(raw)

    def knows(self, record: Digest) -> bool:
        return record in self._read

    def known_records(self) -> tuple[Digest, ...]:
        return tuple(self._read - {self.model})

    def inventory(self) -> list[tuple[str, BlobRef]]:
        """(kind, record) of all that peers may want, and that this home has with all that belongs to it."""
        rows = self.home.index.records(self.model)
        return [
            (row.kind, row.record)
            for row in rows
            if row.kind != "manifest" and row.record.digest in self._read and self._is_whole(row)
        ]

    def _is_whole(self, row: RecordRow) -> bool:
        """Whether the record's blobs are here: those of what nobody merged or adopted may have been removed."""
        blobs: tuple[BlobRef, ...] = ()
        if row.record.digest in self.patches:
            blobs = self.patches[row.record.digest].blobs
        elif row.record.digest in self._candidate_of:
            blobs = self.blobs_of(self.candidates[self._candidate_of[row.record.digest]])
        return all(self.home.objects.has(ref.digest) for ref in blobs)

    def blobs_of(self, candidate: Candidate) -> tuple[BlobRef, ...]:
        """What has to be here before a candidate on a known parent is stored, and before this home names it to others:
        its tensors, and the exam of an amendment that brings another one than was in force."""
        amendment = candidate.amendment
        if amendment is None or amendment.exam == self.manifest_at(candidate.parent).exam:
            return candidate.blobs
        return (*candidate.blobs, amendment.exam)

    @property
    def head(self) -> VersionId:
        """The newest proven version; the model id while there is none but the base."""
        return self.versions[-1].id if self.versions else self.model

    @property
    def served_head(self) -> VersionId:
        """The newest version whose values this home holds as well, as its node has noted it."""
        return VersionId(Digest(self.home.refs.get(self.notes.ref("head")) or self.model))

    def note_served(self, version: VersionId) -> None:
        self.home.refs.set(self.notes.ref("head"), version)

    def number(self, version: VersionId) -> VersionNumber:
        """Raises NotFound when the version is none that was adopted here."""
        return BASE_NUMBER if version == self.model else self.version(version).candidate.number

    def version(self, version: VersionId) -> Version:
        for known in self.versions:
            if known.id == version:
                return known
        raise NotFound(f"Version {short(version)} of {self.manifest.name} is not known here.", "See: p2pmodel log")

    def history(self) -> tuple[Version, ...]:
        """Every adopted version, parents before children: `versions`, and what forks left behind."""
        return history(self.founding, self.model, self.candidates, self.verdicts.values())

    def manifest_at(self, version: VersionId) -> Manifest:
        """In force for what follows a version or a candidate that is known here."""
        return in_force(self.founding, self.chain(version))

    @property
    def largest_patch(self) -> int:
        """Bytes that a patch may have by any Manifest that was ever in force: how large one on a given parent may be is
        looked at when it is admitted."""
        return max(limits.max_patch_bytes for limits in self._limits())

    @property
    def largest_header(self) -> int:
        """The same of a patch's record."""
        return max(limits.max_header_bytes for limits in self._limits())

    def _limits(self) -> Iterator[Limits]:
        yield self.founding.limits
        for version in self.versions:
            if version.candidate.amendment is not None:
                yield version.candidate.amendment.limits

    def place_in_plan(self, version: VersionId) -> tuple[int, int]:
        """Of a training on the version. See `logic.lineage.place_in_plan`."""
        return place_in_plan(self.founding, self.chain(version))

    def chain(self, version: VersionId) -> list[Candidate]:
        """From the base on, to a version or a candidate that is known here."""
        chain: list[Candidate] = []
        while version in self.candidates:
            chain.append(self.candidates[version])
            version = chain[-1].parent
        return chain[::-1]

    @property
    def entitled(self) -> frozenset[PeerId]:
        """All that are maintainers in any part of the lineage, or would be by a candidate."""
        amendments = (candidate.amendment for candidate in self.candidates.values())
        return frozenset(self.founding.maintainers).union(*(a.maintainers for a in amendments if a is not None))

    def agrees_to(self, candidate: Candidate) -> bool:
        """Whether the candidate makes the rollback that this home's maintainer agrees to."""
        return candidate.restores and self.notes.agrees_to_rollback(candidate.parent, self.restored_by(candidate))

    def restored_by(self, candidate: Candidate) -> VersionId:
        """The oldest version with the values of a candidate that restores one, and that restored none itself; the base
        when no other has them."""
        if candidate.result == self.founding.base_values:
            return self.model
        made = (version for version in self.versions if not version.candidate.restores)
        same = (version.id for version in made if version.candidate.result == candidate.result)
        return next(same, VersionId(self.model))

    def offer(self) -> LineageOffer:
        return LineageOffer(self.model, self.manifest.name, self.record, self.head)

    def find_version(self, text: str) -> VersionId:
        """By number (`1.0.2`), tag, id or the beginning of one, `base` or `head`. Raises NotFound."""
        if text == "head":
            return self.head
        if text == "base":
            return self.model
        every = {self.model: BASE_NUMBER, **{v.id: v.candidate.number for v in self.versions}}
        if (tagged := self.notes.tags.get(text)) in every:
            return tagged
        try:
            wanted = VersionNumber.parse(text)
        except ValueError:
            found = [v for v in every if abbreviates(text, v)]
        else:
            found = [v for v, number in every.items() if number == wanted]
        if len(found) != 1:
            known = ", ".join(str(n) for n in every.values())
            hint = f"It has: {known}."
            if not found and any(abbreviates(text, candidate) for candidate in self.candidates):
                hint = "It is a candidate that is not adopted, see: p2pmodel round show"
            raise NotFound(f"{self.manifest.name} has no version {text}.", hint)
        return found[0]

    def find_patch(self, text: str) -> PatchId:
        """By id or the beginning of one. Raises NotFound."""
        found = [p for p in self.patches if abbreviates(text, p)]
        if len(found) != 1:
            what = "is not known here" if not found else "could be several patches"
            raise NotFound(f"Patch {text} {what}.", "See: p2pmodel patch list")
        return found[0]

    def find_expert(self, version: VersionId, name: str) -> Expert:
        """Raises NotFound."""
        experts = {expert.name: expert for expert in self.experts(version)}
        if name not in experts:
            raise NotFound(
                f"{self.manifest.name} {self.number(version)} has no expert {name[:64]!r}.",
                f"It has: {', '.join(experts) or 'none'}.",
            )
        return experts[name]

    def result(self, version: VersionId) -> BlobRef | None:
        """The blob with the values of all slots at the version; None for a base whose slots are neutral."""
        return self.founding.base_values if version == self.model else self.version(version).candidate.result

    def experts(self, version: VersionId) -> Experts:
        """Of a version or a candidate that is known here; the base has none."""
        return self.candidates[version].experts if version in self.candidates else ()

    def slots(self, version: VersionId) -> tuple[Slot, ...]:
        """All that a version has a value for, sorted by name."""
        return slots_at(self.manifest.slots, self.experts(version))

    def blobs(self) -> Iterator[BlobRef]:
        """All that the lineage's records refer to."""
        yield self.founding.exam
        if self.founding.base_values is not None:
            yield self.founding.base_values
        for patch in self.patches.values():
            yield from patch.blobs
        for candidate in self.candidates.values():
            yield from candidate.blobs
            if candidate.amendment is not None:
                yield candidate.amendment.exam


def known_lineages(home: Home) -> list[Lineage]:
    return [Lineage(home, model) for model in home.index.models()]


def find_lineage(home: Home, text: str) -> Lineage:
    """By name, id, or the beginning of one, among those that the home knows. Raises NotFound, or InvalidInput when
    several have the name."""
    found = [x for x in known_lineages(home) if x.manifest.name == text or abbreviates(text, x.model)]
    if not found:
        raise NotFound(
            f"No model {text!r} is known here.", "See: p2pmodel model list; or name the folder of a checkpoint."
        )
    if len(found) > 1:
        ids = ", ".join(short(x.model) for x in found)
        raise InvalidInput(f"Several models are called {text!r}: {ids}.", "Use the id.")
    return found[0]
