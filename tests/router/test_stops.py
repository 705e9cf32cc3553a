"""Stop strings in pieces: the same cut as in the whole text, and nothing of the stop string ever leaves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton_router.stops import StopFilter

LETTERS = st.text(alphabet="ab\n", max_size=6)


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    """What leaves, piece by piece, until a stop; with the rest at the end otherwise."""
    filtered, shown = StopFilter(stops), []
    for piece in pieces:
        text, stopped = filtered.push(piece)
        shown.append(text)
        if stopped:
            return shown, True
    return [*shown, filtered.flush()], False


@given(st.lists(LETTERS.filter(bool), max_size=4), st.lists(LETTERS, max_size=12))
def test_the_cut_is_before_the_first_stop_string_to_be_complete(stops: list[str], pieces: list[str]) -> None:
    shown, stopped = run(stops, pieces)
    for count in range(len(pieces) + 1):
        text = "".join(pieces[:count])
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            assert stopped
            assert "".join(shown) == text[: min(found)]
            return
    assert not stopped
    assert "".join(shown) == "".join(pieces)


@given(st.lists(LETTERS.filter(bool), min_size=1, max_size=4), st.lists(LETTERS, max_size=12))
def test_no_more_is_held_back_than_could_begin_a_stop_string(stops: list[str], pieces: list[str]) -> None:
    filtered = StopFilter(stops)
    pushed = shown = ""
    for piece in pieces:
        text, stopped = filtered.push(piece)
        pushed, shown = pushed + piece, shown + text
        if stopped:
            return
        held = pushed[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_text_without_stop_strings_is_never_held() -> None:
    assert StopFilter([]).push("abc") == ("abc", False)


def test_a_stop_string_may_span_three_pieces() -> None:
    assert run(["</s>"], ["ab<", "/", "s", ">c"]) == (["ab", "", "", ""], True)


def test_a_false_start_is_released() -> None:
    assert run(["</s>"], ["ab</", "b"]) == (["ab", "</b", ""], False)
