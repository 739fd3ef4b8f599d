"""Who is to blame for a silence: decided from signs and times alone."""

from p2pmodel.domain.ids import PeerId
from p2pmodel.logic.vigil import LOST_SECONDS, STILL_SECONDS, Progress, Sign, Suspicion, Vigil

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
QUIET = 2 * STILL_SECONDS


def at(taken: int, given: int, *, quiet: float = QUIET, busy: float = 0.0) -> Sign:
    return Sign(busy, (Progress(taken, given, quiet),))


def watch(signs: dict[PeerId, Sign | None], sent: int, *, opening: bool = False, rounds: int = 20) -> Suspicion | None:
    """The same signs, a second apart, until somebody is suspected."""
    vigil = Vigil((A, B, C), opening=opening)
    for second in range(rounds):
        suspicion = vigil.hear(float(second), signs, sent)
        if suspicion is not None:
            return suspicion
    return None


def blamed(suspicion: Suspicion | None) -> PeerId | None:
    return suspicion.peer if suspicion else None


def test_two_misses_in_a_row_are_a_failure_and_one_is_none() -> None:
    vigil = Vigil((A, B, C))
    well: dict[PeerId, Sign | None] = {A: at(1, 1, busy=1.0), B: at(1, 1), C: at(1, 1)}
    for second in range(0, 20, 2):
        assert vigil.hear(second, {**well, B: None}, 1) is None
        assert vigil.hear(second + 1, well, 1) is None
    assert vigil.hear(20.0, {**well, B: None}, 1) is None
    assert blamed(vigil.hear(21.0, {**well, B: None}, 1)) == B


def test_misses_of_different_peers_are_not_added_up() -> None:
    vigil = Vigil((A, B, C))
    assert vigil.hear(0.0, {A: None, B: at(0, 0), C: at(0, 0)}, 1) is None
    assert vigil.hear(1.0, {A: at(1, 0), B: None, C: at(0, 0)}, 1) is None
    assert blamed(vigil.hear(2.0, {A: None, B: None, C: at(0, 0)}, 1)) == B


def test_the_first_of_two_that_are_gone_is_named() -> None:
    assert blamed(watch({A: at(1, 1), B: None, C: None}, 1)) == B


def test_a_peer_that_computes_is_waited_for() -> None:
    assert watch({A: at(1, 1), B: at(1, 0, busy=25.0), C: at(0, 0)}, 1, rounds=1000) is None


def test_bytes_that_move_are_waited_for() -> None:
    assert watch({A: at(1, 1), B: at(0, 0, quiet=STILL_SECONDS / 2), C: at(0, 0)}, 1, rounds=1000) is None


def test_the_peer_that_holds_a_step_without_computing_it_is_named() -> None:
    suspicion = watch({A: at(3, 3), B: at(3, 2), C: at(2, 2)}, 3)
    assert suspicion is not None
    assert suspicion.peer == B
    assert "does not compute" in suspicion.what


def test_the_peer_that_lost_a_frame_is_named() -> None:
    assert blamed(watch({A: at(2, 2), B: at(3, 3), C: at(3, 3)}, 3)) == A
    assert blamed(watch({A: at(3, 3), B: at(3, 3), C: at(2, 2)}, 3)) == C
    assert blamed(watch({A: at(3, 3), B: at(3, 3), C: at(3, 3)}, 3)) == C
    assert blamed(watch({A: at(3, 3), B: Sign(0.0), C: at(2, 2)}, 3)) == B


def test_nothing_is_lost_before_its_time() -> None:
    vigil = Vigil((A,))
    lost: dict[PeerId, Sign | None] = {A: at(1, 0)}
    assert vigil.hear(10.0, lost, 1) is None
    assert vigil.hear(10.0 + LOST_SECONDS / 2, {A: at(1, 0, busy=0.5)}, 1) is None
    assert vigil.hear(11.0 + LOST_SECONDS, lost, 1) is None
    assert blamed(vigil.hear(11.0 + 2 * LOST_SECONDS, lost, 1)) == A


def test_while_a_session_opens_only_pings_count() -> None:
    assert watch({A: Sign(0.0), B: Sign(0.0), C: Sign(0.0)}, 0, opening=True) is None
    assert blamed(watch({A: Sign(0.0), B: Sign(0.0), C: None}, 0, opening=True)) == C


def test_a_peer_can_be_several_hops() -> None:
    vigil = Vigil((A, B, A))
    there: dict[PeerId, Sign | None] = {A: Sign(0.0, (Progress(2, 2, QUIET), Progress(2, 1, QUIET))), B: at(2, 2)}
    assert vigil.hear(0.0, there, 2) is None
    suspicion = vigil.hear(LOST_SECONDS, there, 2)
    assert suspicion is not None
    assert suspicion.peer == A
    assert "does not compute" in suspicion.what


def test_a_gradient_is_looked_for_from_behind() -> None:
    def back(taken: int, given: int) -> Sign:
        return Sign(0.0, (Progress(5, 5, QUIET, taken, given),))

    def loser(a: Sign, b: Sign, c: Sign) -> PeerId | None:
        vigil = Vigil((A, B, C))
        for second in range(20):
            suspicion = vigil.hear(float(second), {A: a, B: b, C: c}, 5, 2)
            if suspicion is not None:
                return suspicion.peer
        return None

    assert loser(back(0, 0), back(0, 0), back(1, 1)) == C
    assert loser(back(1, 1), back(1, 1), back(2, 2)) == B
    assert loser(back(1, 1), back(2, 1), back(2, 2)) == B
    assert loser(back(2, 2), back(2, 2), back(2, 2)) == A
