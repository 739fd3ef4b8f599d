"""The backlog: bounded, fair, and nothing that somebody still has is lost."""

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmodel.domain.ids import Digest, PeerId
from p2pmodel.logic.propagation import Backlog, BacklogRules, Fetch, done, due, failed, next_due, stir, want
from p2pmodel.wire import canonical

PEERS = [PeerId(f"12D3KooW{'A' * 43}{letter}") for letter in "BCDEFGHJKL"]
A, B, C, D = PEERS[:4]
RECORDS = [canonical.digest(bytes([i])) for i in range(60)]
SMALL = BacklogRules(max_entries=8, max_each=4, max_holders=3, slots_each=2)


def wanting(*named: tuple[Digest, PeerId], kind: str = "patch", rules: BacklogRules | None = None) -> Backlog:
    backlog = Backlog(rules or BacklogRules())
    for digest, holder in named:
        backlog = want(backlog, digest, kind, holder, 10, 0.0)
    return backlog


def holders(fetches: tuple[Fetch, ...]) -> list[PeerId]:
    return [fetch.holder for fetch in fetches]


def test_a_record_is_fetched_once_however_many_name_it() -> None:
    backlog = wanting((RECORDS[0], A), (RECORDS[0], B), (RECORDS[0], A))
    backlog, fetches = due(backlog, 0.0, 9)
    assert fetches == (Fetch(RECORDS[0], "patch", 10, A),)
    assert due(backlog, 99.0, 9)[1] == ()
    assert len(done(backlog, RECORDS[0])) == 0
    assert done(backlog, RECORDS[1]) == backlog


def test_the_next_holder_is_asked_at_once_and_then_there_is_a_growing_pause() -> None:
    backlog = wanting((RECORDS[0], A), (RECORDS[0], B))
    asked: list[tuple[float, PeerId]] = []
    now = 0.0
    for _ in range(6):
        backlog, (fetch,) = due(backlog, now, 9)
        asked.append((now, fetch.holder))
        backlog = failed(backlog, fetch.digest, fetch.holder, now)
        when = next_due(backlog)
        assert when is not None
        if when > now:
            assert due(backlog, when - 0.001, 9)[1] == ()
        now = when
    assert asked == [(0.0, A), (0.0, B), (1.0, A), (1.0, B), (3.0, A), (3.0, B)]


def test_the_pause_has_an_end() -> None:
    backlog, now = wanting((RECORDS[0], A)), 0.0
    for _ in range(2000):
        backlog, _ = due(backlog, now, 1)
        backlog = failed(backlog, RECORDS[0], A, now)
        assert now < (next_due(backlog) or 0) <= now + 300
        now = next_due(backlog) or 0


def test_a_new_holder_of_a_failing_record_is_asked_at_once() -> None:
    backlog, _ = due(wanting((RECORDS[0], A)), 0.0, 9)
    backlog = want(failed(backlog, RECORDS[0], A, 0.0), RECORDS[0], "patch", B, 10, 0.5)
    assert holders(due(backlog, 0.5, 9)[1]) == [B]


def test_one_who_has_it_takes_the_place_of_one_who_failed() -> None:
    backlog = wanting(*[(RECORDS[0], peer) for peer in PEERS[:4]], rules=SMALL)
    assert len(backlog.entries[RECORDS[0]].holders) == 3
    backlog, _ = due(backlog, 0.0, 9)
    backlog = want(failed(backlog, RECORDS[0], A, 0.0), RECORDS[0], "patch", D, 10, 0.0)
    assert backlog.entries[RECORDS[0]].holders == (D, B, C)


def test_what_nobody_has_any_more_is_forgotten() -> None:
    backlog, _ = due(wanting((RECORDS[0], A), (RECORDS[0], B)), 0.0, 9)
    backlog = failed(backlog, RECORDS[0], A, 0.0, has_not=True)
    assert backlog.entries[RECORDS[0]].holders == (B,)


def test_a_report_about_something_else_changes_nothing() -> None:
    backlog, _ = due(wanting((RECORDS[0], A)), 0.0, 9)
    assert failed(backlog, RECORDS[0], B, 0.0) == backlog
    assert failed(backlog, RECORDS[1], A, 0.0) == backlog


def test_verdicts_go_before_patches() -> None:
    backlog = wanting((RECORDS[0], A))
    for digest, kind in zip(RECORDS[1:4], ("blob", "candidate", "verdict"), strict=True):
        backlog = want(backlog, digest, kind, PEERS[RECORDS.index(digest)], 10, 0.0)
    assert [fetch.kind for fetch in due(backlog, 0.0, 9)[1]] == ["verdict", "candidate", "patch", "blob"]


def test_no_holder_is_asked_for_too_much_at_once_and_all_get_a_turn() -> None:
    backlog = wanting(
        *[(digest, A) for digest in RECORDS[:20]], *[(digest, B) for digest in RECORDS[20:22]], (RECORDS[30], C)
    )
    _, fetches = due(backlog, 0.0, 3)
    assert holders(fetches) == [A, B, C]
    backlog, fetches = due(backlog, 0.0, 99)
    assert sorted(holders(fetches)) == sorted([A, A, B, B, C])
    assert due(backlog, 0.0, 99)[1] == ()


def test_one_peer_cannot_crowd_out_the_others() -> None:
    backlog = wanting(*[(digest, A) for digest in RECORDS[:10]], (RECORDS[20], B), rules=SMALL)
    assert len(backlog) == 5
    assert RECORDS[20] in backlog


def test_a_full_backlog_gives_up_what_failed_most_and_nothing_else() -> None:
    backlog = wanting(*[(digest, PEERS[i // 4]) for i, digest in enumerate(RECORDS[:8])], rules=SMALL)
    assert want(backlog, RECORDS[9], "patch", C, 10, 0.0) == backlog
    backlog, _ = due(backlog, 0.0, 1)
    backlog = want(failed(backlog, RECORDS[0], A, 0.0), RECORDS[9], "patch", C, 10, 0.0)
    assert RECORDS[9] in backlog
    assert RECORDS[0] not in backlog
    assert len(backlog) == 8


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(RECORDS), st.sampled_from(PEERS), st.sampled_from("wwwdfF")), max_size=120))
def test_the_backlog_is_bounded_whatever_happens(steps: list[tuple[Digest, PeerId, str]]) -> None:
    backlog = Backlog(SMALL)
    for now, (digest, peer, what) in enumerate(steps):
        if what == "w":
            backlog = want(backlog, digest, "patch", peer, 10, now)
        elif what == "d":
            backlog, _ = due(backlog, now, 5)
        else:
            backlog = failed(backlog, digest, peer, now, has_not=what == "F")
        entries = backlog.entries.values()
        assert len(backlog) <= 8
        assert all(1 <= len(entry.holders) <= 3 and len(set(entry.holders)) == len(entry.holders) for entry in entries)
        assert all(entry.asking is None or entry.asking in entry.holders for entry in entries)
        asked = [entry.asking for entry in entries if entry.asking is not None]
        assert len(asked) <= 5
        assert all(asked.count(peer) <= 2 for peer in asked)
        assert Counter(entry.named_by for entry in entries) == backlog.named
        assert max(backlog.named.values(), default=0) <= 4


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from(RECORDS), st.sampled_from(PEERS)), min_size=1, max_size=60),
    st.sets(st.sampled_from(PEERS)),
    st.randoms(use_true_random=False),
)
def test_everything_that_one_living_peer_has_arrives(
    named: list[tuple[Digest, PeerId]], dead: set[PeerId], chance: random.Random
) -> None:
    """The dead never answer; the living fail now and then; a few have thrown away what they named."""
    backlog = wanting(*named, rules=BacklogRules(max_holders=10))
    thrown = {pair for pair in named if chance.random() < 0.2}
    reachable = {digest for digest, peer in named if peer not in dead and (digest, peer) not in thrown}
    arrived: set[Digest] = set()
    now = 0.0
    for _ in range(3000):
        backlog, fetches = due(backlog, now, 4)
        for fetch in chance.sample(fetches, len(fetches)):
            gone = (fetch.digest, fetch.holder) in thrown
            if fetch.holder in dead or (not gone and chance.random() < 0.2):
                backlog = failed(backlog, fetch.digest, fetch.holder, now)
            elif gone:
                backlog = failed(backlog, fetch.digest, fetch.holder, now, has_not=True)
            else:
                backlog = done(backlog, fetch.digest)
                arrived.add(fetch.digest)
        if reachable <= arrived:
            break
        now = max(now, next_due(backlog) or now)
    assert arrived == reachable


def test_what_waited_for_something_that_has_come_is_due_at_once() -> None:
    backlog = wanting((RECORDS[0], A), kind="candidate")
    for _ in range(3):
        backlog, fetches = due(backlog, 1000.0, 8)
        backlog = failed(backlog, RECORDS[0], fetches[0].holder, 1000.0)
        backlog = stir(backlog, RECORDS[:2], 1000.0)
    assert due(backlog, 1000.0, 8)[1]
    assert RECORDS[1] not in backlog
