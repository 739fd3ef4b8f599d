"""Who proposes, what verdicts amount to, and a lineage that proves itself from the Manifest on."""

import dataclasses
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.version import Candidate, Verdict, VersionNumber
from p2pmodel.logic import quorum
from p2pmodel.logic.lineage import assemble, forks, verify_chain
from p2pmodel.logic.quorum import Vote
from p2pmodel.wire import canonical, records
from p2pmodel.wire.signing import Key
from tests.support.factories import candidate, manifest

KEYS = [Key.generate() for _ in range(4)]
MANIFEST = manifest(*KEYS[:3], threshold=2)
MAINTAINERS = MANIFEST.maintainers
STRANGER = KEYS[3].peer
MODEL = canonical.digest(canonical.encode(MANIFEST))
A, B = (VersionId(canonical.digest(text)) for text in (b"a", b"b"))

votes = st.builds(
    Vote, st.sampled_from([*MAINTAINERS, STRANGER]), st.integers(1, 2), st.sampled_from([A, B]), st.booleans()
)


@given(st.integers(1, 10**6), st.randoms())
def test_all_agree_on_who_proposes(round: int, chance: random.Random) -> None:
    shuffled = chance.sample(MAINTAINERS, len(MAINTAINERS))
    order = quorum.proposers(MODEL, round, shuffled)
    assert order == quorum.proposers(MODEL, round, MAINTAINERS)
    assert sorted(order) == sorted(MAINTAINERS)
    without = [peer for peer in MAINTAINERS if peer != order[0]]
    assert quorum.proposers(MODEL, round, without) == order[1:]


def test_proposing_goes_round() -> None:
    first = Counter(quorum.proposers(MODEL, round, MAINTAINERS)[0] for round in range(300))
    assert all(first[peer] > 60 for peer in MAINTAINERS)


@given(st.lists(votes), st.randoms())
def test_a_tally_puts_every_maintainer_in_one_place_whatever_the_order(cast: list[Vote], chance: random.Random) -> None:
    told = quorum.tally(A, 1, cast, MAINTAINERS)
    everyone = told.accepts + told.rejects + told.elsewhere + told.silent
    assert sorted(everyone) == sorted(MAINTAINERS)
    assert told == quorum.tally(A, 1, chance.sample(cast, len(cast)) * 2, MAINTAINERS)


@given(st.lists(votes), votes)
def test_accepts_only_grow(cast: list[Vote], another: Vote) -> None:
    before, after = (set(quorum.tally(A, 1, some, MAINTAINERS).accepts) for some in (cast, [*cast, another]))
    assert before <= after


@given(
    st.permutations(range(3)),
    st.lists(st.tuples(st.sampled_from([A, B]), st.booleans()), min_size=3, max_size=3),
    st.integers(1, 3),
)
def test_hopeless_is_what_no_further_verdict_can_change(
    order: list[int], says: list[tuple[VersionId, bool]], threshold: int
) -> None:
    """Each maintainer signs once: as soon as it is hopeless, the end result has no version at the threshold."""
    cast = [Vote(MAINTAINERS[i], 1, *says[i]) for i in order]
    adopted = any(len(quorum.tally(of, 1, cast, MAINTAINERS).accepts) >= threshold for of in (A, B))
    hopeless = [quorum.is_hopeless(1, cast[:heard], MAINTAINERS, threshold) for heard in range(4)]
    assert hopeless == sorted(hopeless)
    assert hopeless[-1] == (not adopted)


@given(st.integers(1, 9), st.data())
def test_tolerated_liars_cannot_make_two_versions_pass(count: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, count))
    liars = quorum.tolerated_liars(count, threshold)
    # Two versions share out the honest maintainers, and both have all the liars.
    assert 2 * threshold > count + liars
    assert not 2 * threshold > count + liars + 1


def child(parent: VersionId, round: int, number: int, *, patch: bytes = b"patch") -> tuple[VersionId, Candidate]:
    made = dataclasses.replace(
        candidate(MODEL, round, parent, (canonical.digest(patch),)), number=VersionNumber(1, 0, number)
    )
    return records.version_id(made), made


def accepted(version: VersionId, round: int, by: tuple[int, ...] = (0, 1), accept: bool = True) -> list[Verdict]:
    return [Verdict(MAINTAINERS[i], MODEL, round, version, accept, "", ()) for i in by]


def history(*rounds: int) -> list[tuple[VersionId, Candidate, list[Verdict]]]:
    steps: list[tuple[VersionId, Candidate, list[Verdict]]] = []
    parent = VersionId(MODEL)
    for number, round in enumerate(rounds, start=1):
        version, made = child(parent, round, number)
        steps.append((version, made, accepted(version, round)))
        parent = version
    return steps


def test_a_chain_is_verified_from_the_manifest_on() -> None:
    assert verify_chain(MANIFEST, MODEL, []) == ()
    chain = verify_chain(MANIFEST, MODEL, history(1, 2, 5))
    assert [str(version.candidate.number) for version in chain] == ["1.0.1", "1.0.2", "1.0.3"]
    assert all(len(version.verdicts) == 2 for version in chain)


def test_verdicts_that_do_not_count_prove_nothing() -> None:
    version, made = child(VersionId(MODEL), 1, 1)
    other, _ = child(VersionId(MODEL), 1, 1, patch=b"other")
    one = accepted(version, 1, (0,))
    for more in (
        one,
        accepted(version, 1, (1,), accept=False),
        accepted(version, 2, (1,)),
        accepted(other, 1, (1,)),
        [dataclasses.replace(one[0], maintainer=STRANGER)],
        [dataclasses.replace(one[0], reason="again")],
        [dataclasses.replace(accepted(version, 1, (1,))[0], model=canonical.digest(b"another model"))],
    ):
        with pytest.raises(Rejected, match="accepted by 1 ") as refused:
            verify_chain(MANIFEST, MODEL, [(version, made, [*one, *more])])
        assert refused.value.reason == "chain"
        assert assemble(MANIFEST, MODEL, {version: made}, [*one, *more]) == ()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda steps: steps[1:], "does not follow"),
        (lambda steps: [steps[0], steps[2]], "does not follow"),
        (lambda steps: [*steps, steps[1]], "second child"),
        (lambda steps: [*steps[:2], steps[0]], "second child"),
        (lambda steps: [steps[1], steps[0]], "does not follow"),
    ],
)
def test_gaps_and_forks_are_refused(spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Rejected, match=message):
        verify_chain(MANIFEST, MODEL, spoil(history(1, 2, 3)))


@pytest.mark.parametrize(
    ("round", "number", "message"), [(2, 2, "of round 2"), (1, 2, "of round 1"), (3, 3, "1.0.3"), (3, 1, "1.0.1")]
)
def test_rounds_increase_and_numbers_follow(round: int, number: int, message: str) -> None:
    first = history(2)
    version, made = child(first[0][0], round, number)
    with pytest.raises(Rejected, match=message):
        verify_chain(MANIFEST, MODEL, [*first, (version, made, accepted(version, round))])
    assert (
        len(
            assemble(
                MANIFEST, MODEL, {first[0][0]: first[0][1], version: made}, [*first[0][2], *accepted(version, round)]
            )
        )
        == 1
    )


def test_a_version_of_another_model_is_refused() -> None:
    foreign = dataclasses.replace(candidate(canonical.digest(b"other"), 1, MODEL))
    version = records.version_id(foreign)
    with pytest.raises(Rejected, match="another model"):
        verify_chain(MANIFEST, MODEL, [(version, foreign, accepted(version, 1))])


@given(st.lists(st.integers(1, 4), max_size=8), st.randoms())
def test_a_late_joiner_assembles_the_history_from_records_in_any_order(gaps: list[int], chance: random.Random) -> None:
    steps = history(*[sum(gaps[: i + 1]) for i in range(len(gaps))])
    loose = [child(version, 50, i + 2, patch=b"nobody accepted this") for i, (version, _, _) in enumerate(steps)]
    candidates = [(version, made) for version, made, _ in steps] + loose
    verdicts = [verdict for _, _, some in steps for verdict in some]
    found = assemble(
        MANIFEST, MODEL, dict(chance.sample(candidates, len(candidates))), chance.sample(verdicts, len(verdicts))
    )
    assert found == verify_chain(MANIFEST, MODEL, steps)
    assert forks(MANIFEST, MODEL, dict(candidates), verdicts) == ()


def test_what_hangs_on_a_missing_version_waits() -> None:
    steps = history(1, 2, 3)
    candidates = {version: made for version, made, _ in steps if version != steps[1][0]}
    assert len(assemble(MANIFEST, MODEL, candidates, [v for _, _, some in steps for v in some])) == 1


def test_all_choose_the_same_side_of_a_fork() -> None:
    low, high = child(VersionId(MODEL), 1, 1), child(VersionId(MODEL), 2, 1)
    both = dict([low, high])
    verdicts = accepted(low[0], 1) + accepted(high[0], 2)
    assert [version.id for version in assemble(MANIFEST, MODEL, both, verdicts)] == [high[0]]
    assert forks(MANIFEST, MODEL, both, verdicts) == (tuple(sorted(both)),)
    longer = child(low[0], 3, 2)
    chain = assemble(MANIFEST, MODEL, both | dict([longer]), verdicts + accepted(longer[0], 3))
    assert [version.id for version in chain] == [low[0], longer[0]]


def test_two_versions_of_one_round_are_told_apart_by_their_ids() -> None:
    sides = [child(VersionId(MODEL), 1, 1, patch=bytes([i])) for i in range(5)]
    verdicts = [verdict for version, _ in sides for verdict in accepted(version, 1)]
    assert [version.id for version in assemble(MANIFEST, MODEL, dict(sides), verdicts)] == [
        min(version for version, _ in sides)
    ]
