"""A version as a folder of its own, and its proof: what is needed to run it anywhere, and to trust it offline.

    state.safetensors    the values of all slots, byte for byte what the candidate's digest names
    version.json         what it is, and what it needs: kinds, base files by digest, software
    proof.msgpack        the Manifest and the records from it on; `p2pmodel version verify DIR` needs nothing else
    base files           with `base`: config, tokenizer and weights, hard links where the file system can

Nothing of the home moves: what a node serves is the adopted head, whatever lies checked out.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path

from p2pmodel import __version__
from p2pmodel.domain.errors import InvalidInput, NotFound, Rejected
from p2pmodel.domain.ids import Digest, VersionId, short
from p2pmodel.domain.model import BlobRef, Manifest
from p2pmodel.domain.modular import Experts, slots_at
from p2pmodel.domain.version import BASE_NUMBER, Candidate, Verdict, Version
from p2pmodel.logic.admission import result_limit
from p2pmodel.logic.lineage import verify_chain
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import base_ref, version_state
from p2pmodel.store.disk import storage_errors
from p2pmodel.store.scratch import Scratch
from p2pmodel.tensors import blob
from p2pmodel.wire import canonical, records

STATE, DESCRIPTION, PROOF = "state.safetensors", "version.json", "proof.msgpack"
MAX_PROOF_BYTES = 256 << 20
SOFTWARE = ("torch", "transformers", "tokenizers", "safetensors")
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)\s*([<>=!~0-9.,*]+)")


@dataclass(frozen=True)
class Proof:
    """Signed records: the Manifest's, and of each version after the base, in order, the candidate's and verdicts'."""

    manifest: bytes
    versions: tuple[tuple[bytes, tuple[bytes, ...]], ...]


@dataclass(frozen=True)
class Proven:
    """What a verified chain ends in. state: of its values; None for the neutral ones of a base, which follow from the
    slots."""

    manifest: Manifest
    model: Digest
    versions: tuple[Version, ...]
    state: BlobRef | None

    @property
    def number(self) -> str:
        return str(self.versions[-1].candidate.number if self.versions else BASE_NUMBER)

    @property
    def experts(self) -> Experts:
        return self.versions[-1].candidate.experts if self.versions else ()

    @property
    def id(self) -> VersionId:
        return self.versions[-1].id if self.versions else VersionId(self.model)


def check_out(lineage: Lineage, version: VersionId, folder: Path, base: Path | None) -> tuple[str, ...]:
    """Writes the version into a new or empty folder, with the base's files when `base` names where they are. -> names
    of the files. Raises InvalidInput for a folder that holds something, NotFound when the values are not here."""
    state = state_bytes(lineage, version)
    folder = folder.resolve()
    with storage_errors(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InvalidInput(f"{folder} is not empty.", "Name a folder that is not there yet.")
        folder.mkdir(parents=True, exist_ok=True)
    scratch = Scratch(folder)
    names = [STATE, DESCRIPTION, PROOF]
    if base is not None:
        for file in lineage.manifest.files:
            _link(base / file.name, folder / file.name)
            names.append(file.name)
    scratch.write(folder / STATE, state, 0o644)
    scratch.write(folder / PROOF, canonical.encode(prove(lineage, version)), 0o644)
    description = json.dumps(describe(lineage, version, state), indent=2, ensure_ascii=False) + "\n"
    scratch.write(folder / DESCRIPTION, description.encode(), 0o644)
    return tuple(names)


def describe(lineage: Lineage, version: VersionId, state: bytes) -> dict[str, object]:
    """What version.json holds."""
    manifest = lineage.manifest
    return {
        "model": lineage.model,
        "name": manifest.name,
        "version": version,
        "number": str(lineage.number(version)),
        "licence": manifest.licence,
        "architecture": manifest.architecture,
        "kinds": list(manifest.kinds),
        "state": {"file": STATE, "digest": canonical.digest(state), "bytes": len(state)},
        "origin": manifest.origin and dataclasses.asdict(manifest.origin),
        "base": {
            "source": manifest.source,
            "files": [{"name": f.name, "digest": f.blob.digest, "bytes": f.blob.size} for f in manifest.files],
        },
        "software": {"p2pmodel": f">={__version__}", **software()},
    }


def software() -> dict[str, str]:
    """The versions that this release takes of what computes a model, by package."""
    wanted = (_REQUIREMENT.fullmatch(text) for text in requires("p2pmodel") or ())
    return {want[1]: want[2] for want in wanted if want and want[1] in SOFTWARE}


def state_bytes(lineage: Lineage, version: VersionId) -> bytes:
    """The blob of the version's slots; a neutral base's is made here. Raises NotFound."""
    ref = lineage.result(version)
    if ref is None:
        return blob.pack(version_state(lineage, version))
    if not lineage.home.objects.has(ref.digest):
        raise NotFound(
            f"The values of version {short(version)} are not on this machine yet.",
            "A node of this home fetches them: p2pmodel join",
        )
    return lineage.home.objects.load(ref.digest)


def prove(lineage: Lineage, version: VersionId) -> Proof:
    """The records of the home from the Manifest to the version."""
    objects, model = lineage.home.objects, lineage.model
    chain = lineage.versions[: [v.id for v in lineage.versions].index(version) + 1] if version != model else ()
    candidates: dict[VersionId, bytes] = {}
    verdicts: dict[bytes, bytes] = {}
    for row in lineage.home.index.records(model):
        if row.kind == "candidate":
            record = objects.load(row.record.digest)
            candidates.setdefault(records.open_candidate(record)[2], record)
        elif row.kind == "verdict":
            record = objects.load(row.record.digest)
            verdicts.setdefault(canonical.encode(records.open_verdict(record)), record)
    return Proof(
        objects.load(model),
        tuple((candidates[v.id], tuple(verdicts[canonical.encode(x)] for x in v.verdicts)) for v in chain),
    )


def verify_proof(proof: Proof) -> Proven:
    """Every signature, then the chain from the Manifest on. Raises Rejected with the first that fails."""
    manifest, _ = records.open_manifest(proof.manifest)
    model = canonical.digest(proof.manifest)
    links: list[tuple[VersionId, Candidate, list[Verdict]]] = []
    governing = manifest
    for candidate_record, verdict_records in proof.versions:
        candidate, proposer, version = records.open_candidate(candidate_record)
        if proposer not in governing.maintainers:
            raise Rejected("proposer", f"Version {short(version)} was proposed by {proposer}, who is no maintainer.")
        governing = governing.amended(candidate.amendment)
        links.append((version, candidate, [records.open_verdict(record) for record in verdict_records]))
    chain = verify_chain(manifest, model, links)
    for at, link in enumerate(chain):
        if link.candidate.restores and link.candidate.result not in _older(manifest, chain[:at]):
            raise Rejected("merge", f"Version {short(link.id)} restores values that no older version has.")
        if link.candidate.amends and link.candidate.result != _older(manifest, chain[:at])[-1]:
            raise Rejected(
                "merge", f"Version {short(link.id)} amends the Manifest, and has other values than its parent."
            )
    return Proven(manifest, model, chain, chain[-1].candidate.result if chain else manifest.base_values)


def _older(manifest: Manifest, chain: Sequence[Version]) -> list[BlobRef]:
    """The values of the base and of the versions after it."""
    return [base_ref(manifest), *(version.candidate.result for version in chain)]


def verify_version(lineage: Lineage, version: VersionId) -> tuple[Proven, int]:
    """Of the home's own objects, each read and hashed anew: records, and the values of every version of the chain. ->
    what is proven, and how many versions' values are here. Raises Rejected, StorageError for a damaged object."""
    proven = verify_proof(prove(lineage, version))
    begins = proven.manifest.base_values
    if begins is not None and lineage.home.objects.has(begins.digest):
        check_state(proven.manifest, begins, (), lineage.home.objects.load(begins.digest))
    here = 0
    for link in proven.versions:
        if lineage.home.objects.has(link.candidate.result.digest):
            raw = lineage.home.objects.load(link.candidate.result.digest)
            check_state(proven.manifest, link.candidate.result, link.candidate.experts, raw)
            here += 1
    return proven, here


def verify_folder(folder: Path) -> Proven:
    """Of a checked out version, without any home. Raises InvalidInput, Rejected."""
    proof = canonical.decode(_read(folder / PROOF, MAX_PROOF_BYTES), Proof, MAX_PROOF_BYTES)
    proven = verify_proof(proof)
    raw = _read(folder / STATE, result_limit(proven.manifest, proven.experts))
    if proven.state is None:
        # Nobody signed neutral values, but they follow from the slots.
        blob.unpack(raw, slots_at(proven.manifest.slots, ()), len(raw))
    else:
        check_state(proven.manifest, proven.state, proven.experts, raw)
    return proven


def check_state(manifest: Manifest, promised: BlobRef, experts: Experts, raw: bytes) -> None:
    """Raises Rejected."""
    if BlobRef(canonical.digest(raw), len(raw)) != promised:
        raise Rejected("digest", f"The values are not those that the version names ({short(promised.digest)}).")
    slots = slots_at(manifest.slots, experts)
    if blob.unpack(raw, slots, len(raw)).keys() != {slot.name for slot in slots}:
        raise Rejected("shape", "The version does not give a value for every slot of the model.")


def _read(path: Path, limit: int) -> bytes:
    try:
        if path.stat().st_size > limit:
            raise Rejected("size", f"{path.name} is over the limit of {limit} bytes.")
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"{path} can't be read: {error.strerror}.", "Name a folder that p2pmodel checkout wrote."
        ) from None


def _link(source: Path, target: Path) -> None:
    with storage_errors(target):
        try:
            os.link(source.resolve(), target)
        except OSError:
            shutil.copyfile(source, target)
