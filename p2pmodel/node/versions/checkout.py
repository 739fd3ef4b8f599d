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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path

from p2pmodel import __version__
from p2pmodel.domain.errors import InvalidInput, Rejected
from p2pmodel.domain.ids import ModelId, VersionId, short
from p2pmodel.domain.model import BlobRef, Manifest
from p2pmodel.domain.modular import Experts, slots_at
from p2pmodel.domain.version import BASE_NUMBER, Candidate, Verdict, Version
from p2pmodel.logic.admission import result_limit
from p2pmodel.logic.lineage import verify_chain
from p2pmodel.node.lineages import hub
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import base_ref, state_bytes
from p2pmodel.store.disk import storage_errors
from p2pmodel.store.scratch import Scratch
from p2pmodel.tensors import blob
from p2pmodel.wire import canonical, records

STATE, DESCRIPTION, PROOF = "state.safetensors", "version.json", "proof.msgpack"
MAX_PROOF_BYTES = 256 << 20
MAX_DESCRIPTION_BYTES = 16 << 20
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
    model: ModelId
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
    told = describe(lineage.manifest, lineage.model, version, str(lineage.number(version)), canonical.blob_ref(state))
    description = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
    scratch.write(folder / DESCRIPTION, description.encode(), 0o644)
    return tuple(names)


def describe(manifest: Manifest, model: ModelId, version: VersionId, number: str, state: BlobRef) -> dict[str, object]:
    """What version.json holds."""
    return {
        "model": model,
        "name": manifest.name,
        "version": version,
        "number": number,
        "licence": manifest.licence,
        "architecture": manifest.architecture,
        "kinds": list(manifest.kinds),
        "state": {"file": STATE, "digest": state.digest, "bytes": state.size},
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
    return Proven(manifest, ModelId(model), chain, chain[-1].candidate.result if chain else manifest.base_values)


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


def verify_folder(folder: Path) -> tuple[Proven, int]:
    """Of a checked out version, without any home: its values, what its description says, and such files of the base as
    are there. -> what is proven, and how many these are. Raises InvalidInput, Rejected."""
    proof = canonical.decode(_read(folder / PROOF, MAX_PROOF_BYTES), Proof, MAX_PROOF_BYTES)
    proven = verify_proof(proof)
    raw = _read(folder / STATE, result_limit(proven.manifest, proven.experts))
    # Nobody signed neutral values, but they follow from the slots.
    state = proven.state or base_ref(proven.manifest)
    check_state(proven.manifest, state, proven.experts, raw)
    _check_description(folder, describe(proven.manifest, proven.model, proven.id, proven.number, state))
    there = [file for file in proven.manifest.files if (folder / file.name).exists()]
    for file in there:
        if hub.describe(folder / file.name) != file.blob:
            raise Rejected(
                "digest", f"{file.name} is not the base's file of that name.", "Check the version out again."
            )
    return proven, len(there)


def _check_description(folder: Path, expected: Mapping[str, object]) -> None:
    try:
        told = json.loads(_read(folder / DESCRIPTION, MAX_DESCRIPTION_BYTES))
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise Rejected("schema", f"{DESCRIPTION} is no JSON object.", "Check the version out again.")
    for key, value in json.loads(json.dumps(expected)).items():
        if key != "software" and told.get(key) != value:  # of the release that wrote it
            raise Rejected("schema", f"{DESCRIPTION} says something else of {key} than what is proven.")


def check_state(manifest: Manifest, promised: BlobRef, experts: Experts, raw: bytes) -> None:
    """Raises Rejected."""
    if canonical.blob_ref(raw) != promised:
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
