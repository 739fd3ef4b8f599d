"""What is refused before it costs anything, and the one word that says why."""

import dataclasses
from typing import Any

import pytest

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.model import BlobRef, MergeSpec
from p2pmodel.domain.version import BASE_NUMBER, DomainScore, LeftOut, Verdict, VersionNumber
from p2pmodel.logic.admission import MAX_FAILED_ROUNDS, check_candidate, check_patch, check_verdict
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.factories import blob, candidate, manifest, patch

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


def test_a_good_candidate_passes() -> None:
    check_candidate(
        candidate(MODEL, 4),
        MANIFEST,
        model=MODEL,
        proposer=KEY.peer,
        parent_number=VersionNumber(1, 0, 3),
        parent_round=3,
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
    bad = dataclasses.replace(candidate(MODEL, 4), **changes)
    with pytest.raises(Rejected) as refused:
        check_candidate(
            bad, MANIFEST, model=MODEL, proposer=KEY.peer, parent_number=VersionNumber(1, 0, 3), parent_round=3
        )
    assert refused.value.reason == reason


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
