"""All records that ever were, and which versions some of them prove. A set of records is a whole number, a bit each."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from p2pmodel.domain.ids import Digest, ModelId, PatchId, PeerId, VersionId
from p2pmodel.domain.model import BlobRef, Limits, Manifest, MergeSpec, ModelFile, Schedule
from p2pmodel.domain.patch import Patch, Provenance, Recipe
from p2pmodel.domain.version import AMEND, BASE_NUMBER, Candidate, LeftOut, Verdict, Version, VersionNumber
from p2pmodel.logic.lineage import assemble

MERGE = MergeSpec("mean@1")
RECIPE = Recipe(seed=0, steps=1, batch=1, sequence=8, optimizer="none", learning_rate=0.0, fisher_examples=1)
PROVENANCE = Provenance((), RECIPE, (), 1, ())
RECORD_BYTES = 2048


@dataclass(frozen=True)
class Entry:
    """One record. blobs: how many come with it, of `size` bytes in all, the record's own included; forged: its
    signature is wrong; good: what the exam finds of a patch, or of all patches of a candidate."""

    number: int
    kind: str
    digest: Digest
    noun: Patch | Candidate | Verdict
    signer: PeerId
    size: int
    blobs: int
    version: VersionId | None = None
    forged: bool = False
    good: bool = True


@dataclass(frozen=True)
class Chain:
    """The versions that a set of records proves."""

    versions: tuple[Version, ...]
    head: VersionId
    round: int
    number: VersionNumber
    parents: frozenset[VersionId]


class Book:
    def __init__(self, name: str, schedule: Schedule, maintainers: tuple[PeerId, ...], threshold: int) -> None:
        self.model = ModelId(digest(f"model {name}"))
        self.manifest = Manifest(
            name=name,
            created=0,
            architecture="llama",
            layers=1,
            files=(ModelFile("config.json", blob("config", 1)),),
            source="",
            licence="CC0-1.0",
            kinds=("ia3@1",),
            slots=(),
            merge=MERGE,
            exam=blob("exam", 1),
            schedule=schedule,
            limits=Limits(),
            maintainers=maintainers,
            threshold=threshold,
        )
        self.entries: list[Entry] = []
        self.number_of: dict[Digest, int] = {}
        self.candidates: dict[VersionId, int] = {}
        self.patches_on: dict[VersionId, int] = {}
        self.candidates_on: dict[VersionId, int] = {}
        self.verdicts_in: dict[int, int] = {}
        self.verdicts_by: dict[PeerId, int] = {}
        self.accepting: dict[VersionId, int] = {}
        self.naming: dict[PatchId, int] = {}
        self.neutral = blob("neutral", RECORD_BYTES)
        self.values = {self.neutral.digest}
        self.patches = self.forgeries = 0
        self._chains: dict[int, Chain] = {}
        self.base = Chain((), VersionId(self.model), 0, BASE_NUMBER, frozenset([VersionId(self.model)]))

    def patch(self, contributor: PeerId, parent: VersionId, size: int, *, good: bool, salt: str) -> Entry:
        noun = Patch(
            contributor=contributor,
            model=self.model,
            parent=parent,
            kind="ia3@1",
            adapter=blob(f"adapter {salt}", size // 2 or 1),
            fisher=blob(f"fisher {salt}", size // 2 or 1),
            samples=1,
            loss_before=2.0,
            loss_after=1.0,
            licence="CC0-1.0",
            provenance=PROVENANCE,
        )
        entry = self._add("patch", f"{contributor} {parent} {salt}", noun, contributor, size=size, blobs=2, good=good)
        self.patches_on[parent] = self.patches_on.get(parent, 0) | 1 << entry.number
        self.patches |= 1 << entry.number
        return entry

    def candidate(
        self, proposer: PeerId, chain: Chain, round: int, patches: tuple[PatchId, ...], left_out: tuple[PatchId, ...]
    ) -> Entry:
        result = blob(f"result {chain.head} {patches}", RECORD_BYTES)
        noun = self._merge(chain, round, patches, left_out, result)
        good = all(self.entries[self.number_of[patch]].good for patch in patches)
        text = f"{chain.head} {round} {patches} {left_out}"
        entry = self._propose(proposer, noun, text, good=good)
        for patch in (*patches, *left_out):
            self.naming[patch] = self.naming.get(patch, 0) | 1 << entry.number
        return entry

    def spoiled(self, proposer: PeerId, chain: Chain, round: int, patches: tuple[PatchId, ...]) -> Entry:
        """A candidate with other values than its patches give."""
        noun = self._merge(chain, round, patches, (), blob(f"spoiled {chain.head} {round} {proposer}", RECORD_BYTES))
        return self._propose(proposer, noun, f"spoiled {chain.head} {round} {patches} {proposer}", good=False)

    def amending(self, proposer: PeerId, chain: Chain, round: int, at: int) -> Entry:
        """A candidate that would change the limits; `at`: another each time."""
        limits = replace(self.manifest.limits, max_patch_bytes=at + 1)
        result = chain.versions[-1].candidate.result if chain.versions else self.neutral
        noun = Candidate(
            model=self.model,
            round=round,
            parent=chain.head,
            number=chain.number.next_patch(),
            patches=(),
            left_out=(),
            merge=AMEND,
            alpha=0.0,
            result=result,
            amendment=replace(self.manifest.amendment, limits=limits),
        )
        return self._propose(proposer, noun, f"amending {chain.head} {round} {at}", good=True)

    def _merge(
        self, chain: Chain, round: int, patches: tuple[PatchId, ...], left_out: tuple[PatchId, ...], result: BlobRef
    ) -> Candidate:
        return Candidate(
            model=self.model,
            round=round,
            parent=chain.head,
            number=chain.number.next_patch(),
            patches=tuple(sorted(patches)),
            left_out=tuple(LeftOut(patch, "it makes the model worse") for patch in sorted(left_out)),
            merge=MERGE,
            alpha=1.0,
            result=result,
        )

    def _propose(self, proposer: PeerId, noun: Candidate, text: str, *, good: bool) -> Entry:
        version = VersionId(digest(f"version {text}"))
        size = noun.result.size
        entry = self._add(
            "candidate", f"{proposer} {text}", noun, proposer, size=size, blobs=1, good=good, version=version
        )
        self.candidates.setdefault(version, entry.number)
        self.candidates_on[noun.parent] = self.candidates_on.get(noun.parent, 0) | 1 << entry.number
        self.values.add(noun.result.digest)
        return entry

    def verdict(self, maintainer: PeerId, version: VersionId, round: int, accept: bool) -> Entry:
        noun = Verdict(maintainer, self.model, round, version, accept, "" if accept else "it is worse", ())
        entry = self._add("verdict", f"{maintainer} {version} {round} {accept}", noun, maintainer)
        bit = 1 << entry.number
        self.verdicts_in[round] = self.verdicts_in.get(round, 0) | bit
        self.verdicts_by[maintainer] = self.verdicts_by.get(maintainer, 0) | bit
        if accept:
            self.accepting[version] = self.accepting.get(version, 0) | bit
        return entry

    def forgery(self, signer: PeerId, victim: PeerId, chain: Chain, salt: str) -> Entry:
        """A verdict that says to be of `victim`, and has the signature of somebody else."""
        noun = Verdict(victim, self.model, chain.round + 1, chain.head, True, "", ())
        entry = self._add("verdict", f"forged {salt}", noun, signer, forged=True)
        self.forgeries |= 1 << entry.number
        return entry

    def backed(self, stored: int, version: VersionId) -> int:
        """The bit of the version's candidate when these records prove that enough maintainers accept it; else 0."""
        bit = 1 << self.candidates[version]
        accepts = (stored & self.accepting.get(version, 0)).bit_count()
        return bit if stored & bit and accepts >= self.manifest.threshold else 0

    def chain(self, backed: int) -> Chain:
        """Of candidates that are all accepted by enough."""
        if not backed:
            return self.base
        found = self._chains.get(backed)
        if found is None:
            candidates: dict[VersionId, Candidate] = {}
            verdicts: list[Verdict] = []
            for entry in self.of(backed):
                assert isinstance(entry.noun, Candidate)
                assert entry.version is not None
                candidates[entry.version] = entry.noun
                verdicts += [x.noun for x in self.of(self.accepting[entry.version]) if isinstance(x.noun, Verdict)]
            versions = assemble(self.manifest, self.model, candidates, verdicts)
            if versions:
                last = versions[-1].candidate
                parents = frozenset([VersionId(self.model), *(version.id for version in versions)])
                found = Chain(versions, versions[-1].id, last.round, last.number, parents)
            else:
                found = self.base
            self._chains[backed] = found
        return found

    def of(self, records: int) -> Iterator[Entry]:
        for number in bits(records):
            yield self.entries[number]

    def _add(
        self,
        kind: str,
        text: str,
        noun: Patch | Candidate | Verdict,
        signer: PeerId,
        *,
        size: int = 0,
        blobs: int = 0,
        version: VersionId | None = None,
        forged: bool = False,
        good: bool = True,
    ) -> Entry:
        record = digest(f"{kind} {text}")
        if record in self.number_of:
            return self.entries[self.number_of[record]]
        number = len(self.entries)
        entry = Entry(number, kind, record, noun, signer, RECORD_BYTES + size, blobs, version, forged, good)
        self.entries.append(entry)
        self.number_of[record] = number
        return entry


def bits(records: int) -> Iterator[int]:
    """The numbers in the set, ascending."""
    while records:
        low = records & -records
        yield low.bit_length() - 1
        records ^= low


def blob(text: str, size: int) -> BlobRef:
    return BlobRef(digest(text), size)


def digest(text: str) -> Digest:
    return Digest(hashlib.sha256(text.encode()).hexdigest())
