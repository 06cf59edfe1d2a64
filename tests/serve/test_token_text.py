"""A text in pieces ends before a stop string."""

from hypothesis import given
from hypothesis import strategies as st

from sedac_runtime.serve.token_text import StopFilter

pieces_of = st.lists(st.text("ab\n", max_size=4), max_size=12)


@given(pieces_of, st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_its_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    stop_filter, text = StopFilter(stops), ""
    for piece in pieces:
        text += stop_filter.push(piece)
        assert not any(stop in text for stop in stops)
    text += stop_filter.finish()
    whole = "".join(pieces)
    found = [whole.index(stop) for stop in stops if stop in whole]
    assert stop_filter.stopped == bool(found)
    if not found:
        assert text == whole
    else:
        # one that ends earlier wins over one that begins earlier and is not complete yet
        assert whole.startswith(text)
        assert any(whole.startswith(stop, len(text)) for stop in stops)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    stop_filter = StopFilter(["\n\nB"])
    assert [stop_filter.push(piece) for piece in ("a", "\n", "\n", "A\n")] == ["a", "", "", "\n\nA"]
    assert stop_filter.finish() == "\n"
    assert not stop_filter.stopped
