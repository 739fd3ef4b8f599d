"""Amendments of the Manifest: whose word it takes, what they change in the chain, and what they can't."""

import dataclasses

import pytest

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.model import Amendment, Manifest, MergeSpec
from p2pmodel.domain.version import AMEND, Candidate, Verdict, VersionNumber
from p2pmodel.logic.admission import check_candidate, check_verdict
from p2pmodel.logic.lineage import assemble, in_force, place_in_plan, verify_chain
from p2pmodel.logic.quorum import Electorate, double_signers, electorates
from p2pmodel.logic.round_state import CandidateSeen, Phase, RoundRules, VerdictSeen
from p2pmodel.logic.rounds import Outcome, advance, start
from p2pmodel.wire import canonical, records
from p2pmodel.wire.signing import Key
from tests.support.factories import blob, candidate, manifest

OLD = sorted((Key.generate() for _ in range(3)), key=lambda key: key.peer)
NEW = Key.generate()
MANIFEST = manifest(*OLD, threshold=2)
MODEL = canonical.digest(canonical.encode(MANIFEST))
Link = tuple[VersionId, Candidate, list[Verdict]]


def amended(manifest: Manifest = MANIFEST, **changes: object) -> Amendment:
    return dataclasses.replace(manifest.amendment, **changes)  # type: ignore[arg-type]


def turnover(threshold: int = 2) -> Amendment:
    return amended(maintainers=tuple(sorted((OLD[0].peer, NEW.peer))), threshold=threshold)


def amending(amendment: Amendment, parent: VersionId | None = None, round: int = 1) -> Candidate:
    plain = candidate(MODEL, round, parent or VersionId(MODEL))
    return dataclasses.replace(plain, merge=AMEND, patches=(), alpha=0.0, amendment=amendment)


def link(noun: Candidate, *accepting: Key) -> Link:
    version = records.version_id(noun)
    return version, noun, [Verdict(key.peer, MODEL, noun.round, version, True, "", ()) for key in accepting]


def test_keys_change_by_the_old_threshold_and_the_new_one() -> None:
    noun = amending(turnover())
    assert electorates(MANIFEST, noun) == (
        Electorate(MANIFEST.maintainers, 2),
        Electorate(tuple(sorted((OLD[0].peer, NEW.peer))), 2),
    )
    for few in ([OLD[0], OLD[1]], [OLD[0], NEW], [OLD[1], OLD[2], NEW]):
        with pytest.raises(Rejected, match="have to"):
            verify_chain(MANIFEST, MODEL, [link(noun, *few)])
    (version,) = verify_chain(MANIFEST, MODEL, [link(noun, OLD[0], OLD[1], NEW)])
    assert in_force(MANIFEST, [version]).maintainers == tuple(sorted((OLD[0].peer, NEW.peer)))


def test_everything_else_changes_by_the_old_threshold() -> None:
    noun = amending(amended(exam=blob(b"another exam"), limits=dataclasses.replace(MANIFEST.limits, max_patch_bytes=9)))
    assert electorates(MANIFEST, noun) == (Electorate(MANIFEST.maintainers, 2),)
    (version,) = verify_chain(MANIFEST, MODEL, [link(noun, OLD[1], OLD[2])])
    now = in_force(MANIFEST, [version])
    assert (now.exam, now.limits.max_patch_bytes) == (blob(b"another exam"), 9)
    assert (now.name, now.slots, now.merge) == (MANIFEST.name, MANIFEST.slots, MANIFEST.merge)


def test_what_follows_an_amendment_is_judged_by_it() -> None:
    first = link(amending(turnover(threshold=1)), OLD[0], OLD[1])
    after = candidate(MODEL, 2, first[0])
    by_old, by_new = link(after, OLD[1], OLD[2]), link(after, NEW)
    assert [v.id for v in verify_chain(MANIFEST, MODEL, [first, by_new])] == [first[0], by_new[0]]
    with pytest.raises(Rejected):
        verify_chain(MANIFEST, MODEL, [first, by_old])
    for second, length in ((by_new, 2), (by_old, 1)):
        known = {version: noun for version, noun, _ in (first, second)}
        assert len(assemble(MANIFEST, MODEL, known, [*second[2], *first[2]])) == length


def test_an_amendment_keeps_its_parents_values() -> None:
    first = link(candidate(MODEL, 1, VersionId(MODEL)), OLD[0], OLD[1])
    noun = dataclasses.replace(amending(turnover(), first[0], 2), number=VersionNumber(1, 0, 2))
    moved = dataclasses.replace(noun, result=blob(b"other values"))
    everyone = [*OLD, NEW]
    assert len(verify_chain(MANIFEST, MODEL, [first, link(noun, *everyone)])) == 2
    with pytest.raises(Rejected, match="other values"):
        verify_chain(MANIFEST, MODEL, [first, link(moved, *everyone)])
    known = {version: each for version, each, _ in (first, link(moved, *everyone))}
    assert len(assemble(MANIFEST, MODEL, known, [*first[2], *link(moved, *everyone)[2]])) == 1


def test_what_is_no_amendment_is_refused() -> None:
    noun = amending(turnover())
    for wrong in (
        {"merge": MergeSpec("fisher@1")},
        {"amendment": None},
        {"patches": (canonical.digest(b"p"),)},
        {"control": blob()},
    ):
        with pytest.raises(ValueError, match=r"amends|patches"):
            dataclasses.replace(noun, **wrong)  # type: ignore[arg-type]
    for bad in ({"threshold": 4}, {"maintainers": ()}, {"maintainers": tuple(reversed(MANIFEST.maintainers))}):
        with pytest.raises(ValueError, match=r"threshold|maintainers"):
            amended(**bad)

    def check(which: Candidate, allowed: tuple[str, ...]) -> None:
        check_candidate(
            which,
            MANIFEST,
            model=MODEL,
            proposer=OLD[0].peer,
            parent_number=VersionNumber(1, 0, 0),
            parent_round=0,
            restorable=allowed,  # type: ignore[arg-type]
        )

    check(noun, (noun.result.digest,))
    with pytest.raises(Rejected, match="other values"):
        check(noun, ())
    with pytest.raises(Rejected, match="says already"):
        check(amending(MANIFEST.amendment), (noun.result.digest,))


def test_a_verdict_of_one_who_is_no_maintainer_yet_waits_for_its_candidate() -> None:
    _, on, (verdict,) = link(amending(turnover()), NEW)
    with pytest.raises(Rejected) as refused:
        check_verdict(verdict, MANIFEST, model=MODEL, candidate=None)
    assert refused.value.reason == "parent"
    with pytest.raises(Rejected) as refused:
        check_verdict(verdict, MANIFEST, model=MODEL, candidate=on)
    assert refused.value.reason == "maintainer"
    check_verdict(verdict, MANIFEST, model=MODEL, candidate=on, entitled={NEW.peer})


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_round_waits_for_those_who_will_decide(order: tuple[int, ...]) -> None:
    version, noun, verdicts = link(amending(turnover()), OLD[0], OLD[1], NEW)
    rules = RoundRules.from_manifest(MANIFEST, MODEL)
    also = electorates(MANIFEST, noun)[1]
    seen = CandidateSeen(version, OLD[0].peer, (), 1, also, aside=True)
    state, _ = advance(start(1, VersionId(MODEL), 0.0), seen, 1.0, rules, None)
    for at in order:
        assert state.phase is Phase.OPEN
        outcome: Outcome = advance(state, VerdictSeen(verdicts[at]), 2.0, rules, None)
        state = outcome[0]
    assert state.phase is Phase.ADOPTED


def test_a_plan_counts_the_rounds_that_merged_something() -> None:
    plan = dataclasses.replace(MANIFEST, schedule=dataclasses.replace(MANIFEST.schedule, planned_rounds=3))
    merged, amended_limits = candidate(MODEL, 1), amending(amended(plan, exam=blob(b"another exam")))
    assert place_in_plan(plan, []) == (0, 3)
    assert place_in_plan(plan, [merged, amended_limits, merged]) == (2, 3)
    assert place_in_plan(plan, [merged] * 3) == (0, 1)
    another = amending(amended(plan, schedule=dataclasses.replace(plan.schedule, planned_rounds=7)))
    assert place_in_plan(plan, [merged, merged, another, merged]) == (1, 7)
    assert place_in_plan(MANIFEST, [merged]) == (0, 1)


def test_signing_twice_in_a_round_is_proof() -> None:
    a, b = (link(candidate(MODEL, 1, patches=(canonical.digest(text),)), OLD[0], OLD[1]) for text in (b"a", b"b"))
    assert double_signers([*a[2], b[2][0]]) == {(OLD[0].peer, 1): tuple(sorted((a[0], b[0])))}
    assert double_signers(a[2] * 2) == {}


def test_the_differences_are_spelled_out() -> None:
    after = dataclasses.replace(turnover(), schedule=dataclasses.replace(MANIFEST.schedule, min_patches=7))
    said = MANIFEST.amendment.differences(after)
    assert f"maintainer {NEW.peer} comes" in said
    assert f"maintainer {OLD[1].peer} goes" in said
    assert "min patches 3 to 7" in said
