"""Sessions that take turns at a stage: who waits for whom, played through in virtual time."""

from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.logic.gathering import SHARE, Gathering

STEP = 0.020


def play(gaps: list[float], starts: list[float], seconds: float = 4.0) -> list[int]:
    """A stage whose steps take STEP each, with sessions that come back `gaps` after they are answered. The sizes of the
    batches that it computed."""
    gathering, now, batches, looked = Gathering(), 0.0, [], 0.0
    due = dict(enumerate(starts))
    seen: set[int] = set()
    while now < seconds:
        ready = [session for session, at in due.items() if at <= now]
        if not ready:
            now = min(due.values())
            continue
        for session in ready:
            if session not in seen:
                gathering.arrived(session, looked if due[session] < now else now, now)
        seen.update(ready)
        patience = gathering.patience(now)
        later = [at for at in due.values() if now < at <= now + patience]
        if patience:
            now = min(later) if later else now + patience
            continue
        looked = now
        now += STEP
        gathering.computed(STEP)
        batches.append(len(ready))
        for session in ready:
            gathering.answered(session, now)
            due[session] = now + gaps[session]
            seen.discard(session)
    return batches


def test_two_sessions_that_took_turns_come_to_share_every_step() -> None:
    batches = play([0.003, 0.003], [0.0, 0.010])
    assert set(batches[10:]) == {2}


def test_eight_sessions_of_different_delays_share_their_steps() -> None:
    batches = play([0.001 + 0.0004 * n for n in range(8)], [0.003 * n for n in range(8)])
    assert min(batches[20:]) >= 7


def test_a_session_that_is_far_away_is_not_waited_for() -> None:
    alone = play([0.002], [0.0])
    beside = play([0.002, 0.500], [0.0, 0.001])
    assert len(beside) >= 0.95 * len(alone)


@given(gaps=st.lists(st.floats(0.0, 0.2), min_size=1, max_size=6), data=st.data())
def test_waiting_costs_a_bounded_share_and_never_the_others_their_turn(gaps: list[float], data: st.DataObject) -> None:
    starts = [data.draw(st.floats(0.0, 0.05)) for _ in gaps]
    batches = play(gaps, starts, seconds=2.0)
    turns = sum(batches)
    fastest = 2.0 / (min(gaps) + STEP * (1 + SHARE) + STEP)  # of the session that comes back first
    assert turns >= fastest - 2


def test_a_session_that_is_gone_is_waited_for_once() -> None:
    gathering = Gathering()
    gathering.computed(STEP)
    for session in ("stays", "goes"):
        for n in range(3):
            gathering.answered(session, n * 0.1)
            gathering.arrived(session, n * 0.1 + 0.001, n * 0.1 + 0.001)
    gathering.answered("goes", 1.0)
    assert gathering.patience(1.0) > 0
    assert gathering.patience(1.0 + SHARE * STEP) == 0
    assert gathering.patience(1.1) == 0
    gathering.ended("goes")
    gathering.answered("goes", 2.0)
    assert gathering.patience(2.0) == 0
