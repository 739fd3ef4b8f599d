"""What a patch's signed record says of its training, in the words of other tools.

An in-toto Statement v1 (https://in-toto.io/Statement/v1) in a DSSE envelope, whose subjects are the patch's blobs, and
Croissant 1.0 for the data (http://mlcommons.org/croissant/1.0). Both follow from the record, byte for byte: the
statement contains it, so that whoever gets an envelope, signed by whichever peer, can check it against the
contributor's own signature.
"""

import base64
import binascii
import json
from typing import Any

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import PatchId, PeerId
from p2pmodel.domain.patch import DataFile, Patch
from p2pmodel.wire import canonical, records
from p2pmodel.wire.signing import Key, verify_envelope

STATEMENT, PREDICATE = "https://in-toto.io/Statement/v1", "urn:p2pmodel:training:1"
PAYLOAD = "application/vnd.in-toto+json"
MAX_ENVELOPE_BYTES = 8 << 20
SPDX = "https://spdx.org/licenses/"


def envelope(record: bytes, key: Key) -> bytes:
    """A DSSE envelope as JSON. record: of a patch; key: of whoever attests to what the record says."""
    payload = _json(statement(record))
    signature = {"keyid": key.peer, "sig": _base64(key.sign_envelope(PAYLOAD, payload))}
    return _json({"payload": _base64(payload), "payloadType": PAYLOAD, "signatures": [signature]})


def open_envelope(raw: bytes) -> tuple[PatchId, Patch, tuple[PeerId, ...]]:
    """The patch whose record it contains, and who signed the envelope. Raises Rejected("size" | "schema" |
    "signature") when a signature is wrong, or the statement says anything else than the record."""
    if len(raw) > MAX_ENVELOPE_BYTES:
        raise Rejected("size", f"An envelope of {len(raw)} bytes is over the limit of {MAX_ENVELOPE_BYTES}.")
    try:
        outer = json.loads(raw)
        payload, kind = base64.b64decode(outer["payload"], validate=True), str(outer["payloadType"])
        signatures = [(PeerId(str(s["keyid"])), base64.b64decode(s["sig"], validate=True)) for s in outer["signatures"]]
        record = base64.b64decode(json.loads(payload)["predicate"]["record"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
        raise Rejected("schema", "This is no DSSE envelope around the statement of a patch.") from None
    if kind != PAYLOAD or not signatures:
        raise Rejected("schema", "The envelope holds no in-toto statement, or nobody has signed it.")
    for peer, signature in signatures:
        verify_envelope(peer, kind, payload, signature)
    patch = records.open_patch(record)
    if _json(statement(record)) != payload:
        raise Rejected("schema", "The statement says something else than the record that it contains.")
    return canonical.digest(record), patch, tuple(peer for peer, _ in signatures)


def statement(record: bytes) -> dict[str, Any]:
    """Raises Rejected."""
    patch = records.open_patch(record)
    provenance = patch.provenance
    names = ("adapter", "fisher", "control")
    recipe = {name: value for name, value in vars(provenance.recipe).items() if name != "kind_options"}
    steps = [provenance.step_of(at) for at in range(len(provenance.checkpoints))]
    states: list[str | None] = list(provenance.states) or [None] * len(steps)
    predicate = {
        "contributor": patch.contributor,
        "patch": canonical.digest(record),
        "model": patch.model,
        "parent": patch.parent,
        "kind": patch.kind,
        "licence": patch.licence,
        "samples": patch.samples,
        "losses": {"before": patch.loss_before, "after": patch.loss_after, "unit": "nats per token, as claimed"},
        "recipe": recipe | {"kindOptions": dict(provenance.recipe.kind_options)},
        "data": [_described(file) for file in provenance.data],
        "validation": [_described(file) for file in provenance.validation],
        "software": dict(provenance.software),
        "threads": provenance.threads,
        "correction": provenance.correction,
        "chosen": provenance.chosen,
        "checkpoints": [
            {"step": step, "adapter": adapter, "state": state}
            for step, adapter, state in zip(steps, provenance.checkpoints, states, strict=True)
        ],
        "record": _base64(record),
    }
    subjects = [{"name": name, "digest": {"sha256": ref.digest}} for name, ref in zip(names, patch.blobs, strict=False)]
    return {"_type": STATEMENT, "subject": subjects, "predicateType": PREDICATE, "predicate": predicate}


def croissant(patch_id: PatchId, patch: Patch) -> dict[str, Any]:
    """JSON-LD of the data that the patch was trained on: what there is to find them by, not where they are. It is valid
    beside the files, whose URLs are their names."""
    licences = sorted({file.licence for file in patch.provenance.data if file.licence})
    return {
        "@context": {
            "@language": "en",
            "@vocab": "https://schema.org/",
            "sc": "https://schema.org/",
            "cr": "http://mlcommons.org/croissant/",
            "dct": "http://purl.org/dc/terms/",
            "conformsTo": "dct:conformsTo",
        },
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": f"training-data-{patch_id[:10]}",
        "description": f"What patch {patch_id} of model {patch.model} was trained on.",
        "creator": {"@type": "sc:Person", "identifier": patch.contributor},
        "license": [SPDX + licence for licence in licences],
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": f"file-{number}",
                "name": file.name,
                "contentUrl": file.name,
                "contentSize": f"{file.size} B",
                "encodingFormat": _format(file.name),
                "sha256": file.digest,
                **({"license": SPDX + file.licence} if file.licence else {}),
            }
            for number, file in enumerate(patch.provenance.data)
        ],
    }


def _described(file: DataFile) -> dict[str, Any]:
    """As an in-toto ResourceDescriptor."""
    about = {"size": file.size, "examples": file.examples, "licence": file.licence}
    return {"name": file.name, "digest": {"sha256": file.digest}, "annotations": about}


def _format(name: str) -> str:
    suffix = name.lower().rpartition(".")[2]
    known = {"jsonl": "application/jsonlines", "parquet": "application/vnd.apache.parquet", "json": "application/json"}
    return known.get(suffix, "text/plain")


def _json(value: Any) -> bytes:
    """One byte string for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
