"""Canonical encoding, signatures and frames: what one value means, and what is refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.domain.errors import P2PModelError, Rejected
from p2pmodel.domain.ids import Digest
from p2pmodel.domain.model import MergeSpec
from p2pmodel.domain.version import LeftOut, Verdict, VersionNumber
from p2pmodel.wire import canonical, frames, records
from p2pmodel.wire.signing import Key
from tests.support.factories import candidate, manifest, patch

KEY = Key.generate()

numbers = st.builds(VersionNumber, *[st.integers(0, 2**40)] * 3)
digests = st.binary(min_size=1, max_size=4).map(canonical.digest)


@given(number=numbers, reason=st.text(min_size=1, max_size=100), digest=digests)
def test_a_noun_survives_the_wire(number: VersionNumber, reason: str, digest: Digest) -> None:
    for noun in (number, LeftOut(digest, reason)):
        raw = canonical.encode(noun)
        assert canonical.decode(raw, type(noun), 10_000) == noun
        assert canonical.encode(noun) == raw


@given(st.binary(max_size=400))
def test_random_bytes_are_refused_and_nothing_else(raw: bytes) -> None:
    for opener in (
        records.open_manifest,
        records.open_patch,
        records.open_candidate,
        records.open_verdict,
        records.open_lease,
        records.open_presence,
        records.open_announcement,
    ):
        with pytest.raises(Rejected):
            opener(raw)


@given(st.data())
def test_a_record_with_one_bit_changed_is_refused(data: st.DataObject) -> None:
    record = bytearray(KEY.sign("patch", patch(KEY)))
    at = data.draw(st.integers(0, len(record) * 8 - 1))
    record[at // 8] ^= 1 << at % 8
    with pytest.raises(Rejected):
        records.open_patch(bytes(record))


def test_records_open_to_what_was_signed() -> None:
    assert records.open_patch(KEY.sign("patch", patch(KEY))) == patch(KEY)
    noun, signer = records.open_manifest(KEY.sign("manifest", manifest(KEY)))
    assert (noun, signer) == (manifest(KEY), KEY.peer)
    proposed, proposer, version = records.open_candidate(KEY.sign("candidate", candidate()))
    assert (proposed, proposer) == (candidate(), KEY.peer)
    assert version == records.version_id(candidate())


def test_nobody_speaks_for_another_peer() -> None:
    with pytest.raises(Rejected) as refused:
        records.open_patch(Key.generate().sign("patch", patch(KEY)))
    assert refused.value.reason == "owner"


def test_a_signature_is_for_one_kind_only() -> None:
    verdict = Verdict(KEY.peer, canonical.digest(b"m"), 1, canonical.digest(b"v"), True, "", ())
    record = KEY.sign("candidate", verdict)
    with pytest.raises(Rejected) as refused:
        records.open_verdict(record)
    assert refused.value.reason == "kind"


def test_a_record_over_its_limit_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(Rejected) as refused:
        records.open_verdict(b"\xc1" * (1 << 20))
    assert refused.value.reason == "size"


def test_bytes_that_are_not_canonical_are_refused() -> None:
    raw = b"\x83\xa5minor\x01\xa5major\xcd\x00\x02\xa5patch\x03"  # keys out of order, 2 in three bytes
    with pytest.raises(Rejected) as refused:
        canonical.decode(raw, VersionNumber, 100)
    assert refused.value.reason == "canonical"


def test_a_noun_says_which_field_is_wrong() -> None:
    raw = canonical.encode({**canonical_map(MergeSpec("fisher@1")), "parameters": [["b", 1.0], ["a", 2.0]]})
    with pytest.raises(Rejected, match="sorted by name"):
        canonical.decode(raw, MergeSpec, 1000)


def test_a_manifest_with_a_threshold_above_its_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold"):
        dataclasses.replace(manifest(KEY), threshold=2)


def test_a_key_keeps_its_peer_id() -> None:
    again = Key.from_libp2p(KEY.to_libp2p())
    assert again.peer == KEY.peer
    assert again.derive("gossip").peer == KEY.derive("gossip").peer != KEY.peer
    with pytest.raises(P2PModelError):
        Key.from_libp2p(KEY.to_libp2p()[:-1] + b"\x00\x00")


@given(
    st.sampled_from(frames.Kind),
    st.binary(max_size=100),
    st.integers(0, frames.MAX_BODY_BYTES),
    st.integers(0, 2**32 - 1),
)
def test_frames_survive(kind: frames.Kind, meta: bytes, body: int, position: int) -> None:
    raw = frames.pack(kind, meta, body, position, 7)
    assert frames.parse(raw) == frames.Header(kind, len(meta), body, position, 7)


def test_a_frame_too_large_is_refused_by_its_header() -> None:
    with pytest.raises(Rejected):
        frames.parse(frames.HEADER.pack(frames.Kind.DATA, 0, 0, frames.MAX_BODY_BYTES + 1, 0, 1))


def test_a_default_that_was_left_out_is_a_second_spelling() -> None:
    spelt = canonical.encode(MergeSpec("fisher@1"))
    assert canonical.decode(spelt, MergeSpec, 1000) == MergeSpec("fisher@1")
    with pytest.raises(Rejected) as refused:
        canonical.decode(canonical.encode({"strategy": "fisher@1"}), MergeSpec, 1000)
    assert refused.value.reason == "canonical"


def canonical_map(noun: object) -> dict[str, object]:
    return {f.name: getattr(noun, f.name) for f in dataclasses.fields(noun)}  # type: ignore[arg-type]
