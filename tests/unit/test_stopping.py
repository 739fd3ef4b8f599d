"""Stop sequences, however the text is cut into pieces."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.logic.stopping import StopScanner

TEXT = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def cut(text: str, places: list[int]) -> list[str]:
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


@given(TEXT, STOPS, st.lists(st.integers(0, 100), max_size=8))
def test_what_comes_out_is_the_text_before_the_first_stop_sequence(
    text: str, stops: list[str], places: list[int]
) -> None:
    scanner = StopScanner(stops)
    shown = "".join(scanner.feed(piece) for piece in cut(text, places))
    whole = shown + scanner.flush()
    assert text.startswith(whole)
    if scanner.stopped:
        assert any(text[len(whole) :].startswith(stop) for stop in stops)
        assert not any(stop in whole for stop in stops)
    else:
        assert whole == text
        assert not any(stop in text for stop in stops)


@given(TEXT, STOPS)
def test_what_came_out_is_never_part_of_a_stop_sequence_that_came_later(text: str, stops: list[str]) -> None:
    scanner, shown = StopScanner(stops), ""
    for number, character in enumerate(text):
        shown += scanner.feed(character)
        if scanner.stopped:
            assert shown == text[: len(shown)]
            break
        held = text[len(shown) : number + 1]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_after_the_stop_nothing_comes() -> None:
    scanner = StopScanner(["END"])
    assert [scanner.feed(piece) for piece in ("one E", "N", "D two", "three")] == ["one ", "", "", ""]
    assert scanner.flush() == ""


def test_a_beginning_that_comes_to_nothing_is_given_out() -> None:
    scanner = StopScanner(["\n\n"])
    assert scanner.feed("a\n") == "a"
    assert scanner.feed("b") == "\nb"
