"""Statements about patches: what they say follows from the record, and nobody can make them say something else."""

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import Digest
from p2pmodel.domain.model import BlobRef
from p2pmodel.domain.patch import DataFile, Patch, Provenance, Recipe
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key, public_key
from p2pmodel.wire.statement import PAYLOAD, PREDICATE, STATEMENT, croissant, envelope, open_envelope

OWNER, WITNESS = Key.generate(), Key.generate()
RECIPE = Recipe(
    seed=7, steps=50, batch=1, sequence=8, optimizer="adam", learning_rate=0.1, fisher_examples=1,
    kind_options=(("alpha", 16.0), ("rank", 8.0)),
)  # fmt: skip


def digest(text: str) -> Digest:
    return canonical.digest(text.encode())


def record() -> bytes:
    data = (DataFile("a.jsonl", digest("a"), 10, 2, "CC0-1.0"), DataFile("b.txt", digest("b"), 5, 1, ""))
    states = tuple(digest(f"state {n}") for n in range(3))
    provenance = Provenance(data, RECIPE, (("torch", "2"),), 20, states, states, correction=digest("correction"))
    ref = BlobRef(digest("blob"), 4)
    patch = Patch(OWNER.peer, digest("model"), digest("parent"), "lora@1", ref, ref, 3, 2.0, 1.5, "MIT", provenance)
    return OWNER.sign("patch", patch)


def parts(raw: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    outer = json.loads(raw)
    return outer, json.loads(base64.b64decode(outer["payload"]))


def test_a_statement_says_what_the_record_says() -> None:
    outer, inner = parts(envelope(record(), OWNER))
    assert outer["payloadType"] == PAYLOAD
    assert (inner["_type"], inner["predicateType"]) == (STATEMENT, PREDICATE)
    assert inner["subject"][0] == {"name": "adapter", "digest": {"sha256": digest("blob")}}
    predicate = inner["predicate"]
    assert predicate["recipe"]["seed"] == 7
    assert predicate["recipe"]["kindOptions"] == {"alpha": 16.0, "rank": 8.0}
    assert predicate["data"][0]["digest"] == {"sha256": digest("a")}
    assert predicate["data"][0]["annotations"]["licence"] == "CC0-1.0"
    assert [c["step"] for c in predicate["checkpoints"]] == [0, 20, 40]
    assert predicate["correction"] == digest("correction")


def test_anybody_can_verify_it_with_nothing_but_ed25519() -> None:
    outer, _ = parts(envelope(record(), OWNER))
    payload = base64.b64decode(outer["payload"])
    message = b"DSSEv1 %d %s %d %s" % (len(PAYLOAD), PAYLOAD.encode(), len(payload), payload)
    key: Ed25519PublicKey = public_key(outer["signatures"][0]["keyid"])
    key.verify(base64.b64decode(outer["signatures"][0]["sig"]), message)


@pytest.mark.parametrize("key", [OWNER, WITNESS])
def test_an_envelope_is_opened_whoever_signed_it(key: Key) -> None:
    patch_id, patch, signers = open_envelope(envelope(record(), key))
    assert patch_id == canonical.digest(record())
    assert patch.contributor == OWNER.peer
    assert signers == (key.peer,)


def test_what_was_changed_is_refused() -> None:
    outer, inner = parts(envelope(record(), OWNER))
    inner["predicate"]["data"][0]["annotations"]["licence"] = "MIT"
    text = json.dumps(inner, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    forged = {**outer, "payload": base64.b64encode(text).decode()}
    with pytest.raises(Rejected, match="signature of the envelope"):
        open_envelope(json.dumps(forged).encode())
    resigned = {"keyid": WITNESS.peer, "sig": base64.b64encode(WITNESS.sign_envelope(PAYLOAD, text)).decode()}
    with pytest.raises(Rejected, match="something else than the record"):
        open_envelope(json.dumps({**forged, "signatures": [resigned]}).encode())
    for raw in (b"", b"[]", b"{}", json.dumps({**outer, "payload": "?"}).encode(), b"[" * 100_000):
        with pytest.raises(Rejected, match="no DSSE envelope"):
            open_envelope(raw)
    with pytest.raises(Rejected, match="nobody has signed"):
        open_envelope(json.dumps({**outer, "signatures": []}).encode())


def test_croissant_lists_the_files_with_their_licences() -> None:
    _, patch, _ = open_envelope(envelope(record(), OWNER))
    described = croissant(canonical.digest(record()), patch)
    assert described["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    files = described["distribution"]
    assert [(f["name"], f["sha256"], f["encodingFormat"]) for f in files] == [
        ("a.jsonl", digest("a"), "application/jsonlines"),
        ("b.txt", digest("b"), "text/plain"),
    ]
    assert files[0]["license"] == "https://spdx.org/licenses/CC0-1.0"
    assert "license" not in files[1]
    # What mlcroissant cannot do without.
    assert [file["contentUrl"] for file in files] == ["a.jsonl", "b.txt"]
    assert described["@context"]["@language"] == "en"
