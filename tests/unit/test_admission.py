"""What is refused before it costs anything, and the one word that says why."""

import dataclasses
from collections.abc import Collection
from math import prod
from typing import Any

import pytest

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import Digest, VersionId
from p2pmodel.domain.model import BlobRef, Limits, Manifest, MergeSpec, Schedule
from p2pmodel.domain.modular import MAX_EXPERTS, Expert, pool_slot, slots_at
from p2pmodel.domain.version import AMEND, BASE_NUMBER, DomainScore, LeftOut, Verdict, VersionNumber
from p2pmodel.logic.admission import (
    MAX_EXAM_BYTES,
    MAX_FAILED_ROUNDS,
    check_candidate,
    check_patch,
    check_verdict,
    result_limit,
)
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.support.factories import blob, candidate, manifest, patch

KEY = Key.generate()
MANIFEST = manifest(KEY)
MODEL = canonical.digest(b"model")
HEAD = VersionId(canonical.digest(b"head"))
OLD = VersionId(canonical.digest(b"old"))
HUGE = BlobRef(canonical.digest(b"huge"), MANIFEST.limits.max_patch_bytes)


def test_a_good_patch_is_admitted() -> None:
    check_patch(patch(KEY, MODEL, HEAD), MANIFEST, HEAD, (OLD, HEAD), model=MODEL)


@pytest.mark.parametrize(
    ("reason", "changes", "message"),
    [
        ("model", {"model": canonical.digest(b"other")}, "for model"),
        ("parent", {"parent": OLD}, "an older version"),
        ("parent", {"parent": canonical.digest(b"never seen")}, "not known here"),
        ("kind", {"kind": "dense@1"}, "'dense@1'"),
        ("size", {"adapter": HUGE}, "bytes"),
        ("size", {"fisher": HUGE}, "bytes"),
        ("size", {"adapter": BlobRef(canonical.digest(b""), 0)}, "bytes"),
    ],
)
def test_a_patch_is_refused(reason: str, changes: dict[str, Any], message: str) -> None:
    bad = dataclasses.replace(patch(KEY, MODEL, HEAD), **changes)
    with pytest.raises(Rejected, match=message) as refused:
        check_patch(bad, MANIFEST, HEAD, (OLD, HEAD), model=MODEL)
    assert refused.value.reason == reason


def test_a_contributor_has_one_patch_a_round() -> None:
    with pytest.raises(Rejected) as refused:
        check_patch(patch(KEY, MODEL, HEAD), MANIFEST, HEAD, (HEAD,), model=MODEL, contributors={KEY.peer})
    assert refused.value.reason == "duplicate"


def test_a_round_has_no_more_patches_than_its_schedule_says() -> None:
    full = dataclasses.replace(MANIFEST, schedule=Schedule(min_patches=1, max_patches=2))
    others = [Key.generate().peer for _ in range(2)]
    check_patch(patch(KEY, MODEL, HEAD), full, HEAD, (HEAD,), model=MODEL, contributors=others[:1])
    with pytest.raises(Rejected, match="as many as") as refused:
        check_patch(patch(KEY, MODEL, HEAD), full, HEAD, (HEAD,), model=MODEL, contributors=others)
    assert refused.value.reason == "patches"


def test_a_good_candidate_passes() -> None:
    admit(MANIFEST)


def admit(manifest: Manifest, restorable: Collection[Digest] = (), **changes: Any) -> None:
    """A candidate on a version of round 3."""
    check_candidate(
        dataclasses.replace(candidate(MODEL, 4), **changes),
        manifest,
        model=MODEL,
        proposer=KEY.peer,
        parent_number=VersionNumber(1, 0, 3),
        parent_round=3,
        restorable=restorable,
    )


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("model", {"model": canonical.digest(b"other")}),
        ("round", {"round": 3}),
        ("round", {"round": 4 + MAX_FAILED_ROUNDS}),
        ("number", {"number": BASE_NUMBER}),
        ("number", {"number": VersionNumber(1, 1, 0)}),
        ("merge", {"merge": MergeSpec("mean@1")}),
        ("merge", {"merge": MergeSpec("fisher@1", (("clip", 9.0),))}),
        ("patches", {"left_out": (LeftOut(canonical.digest(b"patch"), "worse"),)}),
        ("patches", {"patches": tuple(sorted(canonical.digest(i.to_bytes(2)) for i in range(1001)))}),
        ("size", {"result": BlobRef(canonical.digest(b"result"), 1 << 20)}),
        ("size", {"result": BlobRef(canonical.digest(b""), 0)}),
    ],
)
def test_a_candidate_is_refused(reason: str, changes: dict[str, Any]) -> None:
    with pytest.raises(Rejected) as refused:
        admit(MANIFEST, **changes)
    assert refused.value.reason == reason


def test_experts_are_no_larger_than_any_pool_takes() -> None:
    pools = (pool_slot("layers.0", 8, max_rank=6), pool_slot("layers.1", 8, max_rank=4))
    pooled = dataclasses.replace(MANIFEST, kinds=("expert@1",), slots=pools)
    admit(pooled, experts=(Expert("law", 4),), number=VersionNumber(1, 1, 0))
    for experts in ((Expert("law", 5),), (Expert("code", 4), Expert("law", 1 << 16))):
        with pytest.raises(Rejected, match="takes 1 to 4") as refused:
            admit(pooled, experts=experts, number=VersionNumber(1, 1, 0))
        assert refused.value.reason == "experts"
    most = tuple(Expert(f"e{number:03}", 4) for number in range(MAX_EXPERTS))
    values = sum(prod(slot.shape) for slot in slots_at(pools, most))
    slots = 2 * 4 * MAX_EXPERTS
    assert values * 4 < result_limit(pooled, most) <= 8 * values + 4096 * (slots + 1)


def test_an_amendments_exam_is_no_larger_than_everybody_can_fetch() -> None:
    def amended(size: int, before: int) -> None:
        noun = dataclasses.replace(MANIFEST, exam=BlobRef(MANIFEST.exam.digest, before))
        exam = noun.exam if size == before else BlobRef(canonical.digest(b"another"), size)
        amendment = dataclasses.replace(noun.amendment, exam=exam, limits=Limits(regression_tolerance=0.1))
        admit(noun, merge=AMEND, patches=(), amendment=amendment, restorable={candidate().result.digest})

    amended(MAX_EXAM_BYTES, 4)
    for size in (0, MAX_EXAM_BYTES + 1, 1 << 62):
        with pytest.raises(Rejected, match="exam") as refused:
            amended(size, 4)
        assert refused.value.reason == "size"
    amended(MAX_EXAM_BYTES + 1, MAX_EXAM_BYTES + 1)  # the lineage's own, of which nobody fetches more than before


def test_only_a_maintainer_proposes() -> None:
    with pytest.raises(Rejected) as refused:
        check_candidate(
            candidate(MODEL),
            MANIFEST,
            model=MODEL,
            proposer=Key.generate().peer,
            parent_number=BASE_NUMBER,
            parent_round=0,
        )
    assert refused.value.reason == "proposer"


def test_verdicts_of_maintainers_count() -> None:
    score = DomainScore("general", 2.0, 1.9, 1.8, 1.85)
    good = Verdict(KEY.peer, MODEL, 1, canonical.digest(b"v"), True, "", (score,))
    on = candidate(MODEL, 1)
    check_verdict(good, MANIFEST, model=MODEL, candidate=on)
    check_verdict(good, MANIFEST, model=MODEL, candidate=None)
    for reason, bad in (
        ("model", dataclasses.replace(good, model=blob().digest)),
        ("maintainer", dataclasses.replace(good, maintainer=Key.generate().peer)),
        ("round", dataclasses.replace(good, round=2)),
        ("scores", dataclasses.replace(good, scores=(score, score))),
    ):
        with pytest.raises(Rejected) as refused:
            check_verdict(bad, MANIFEST, model=MODEL, candidate=on)
        assert refused.value.reason == reason
