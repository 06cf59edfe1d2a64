"""Texts in pieces are the whole text, up to a stop string."""

from hypothesis import given
from hypothesis import strategies as st

from sedac_runtime.serve.token_text import StopFilter, TextStream


def decode(tokens: list[int]) -> str:
    """Of a tokenizer whose tokens are bytes."""
    return bytes(tokens).decode("utf-8", errors="replace")


@given(st.text())
def test_pieces_are_whole_characters_and_the_whole_text(text: str) -> None:
    stream = TextStream(decode)
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.finish() == text


@given(st.binary(max_size=20))
def test_nothing_is_lost_of_bytes_that_are_no_text(data: bytes) -> None:
    stream = TextStream(decode)
    pieces = [stream.push(byte) for byte in data]
    text = "".join(pieces) + stream.finish()
    assert text == decode(list(data))


def test_a_character_comes_with_its_last_token() -> None:
    stream = TextStream(decode)
    assert [stream.push(byte) for byte in "a🙂b".encode()] == ["a", "", "", "", "🙂", "b"]


def test_the_space_before_a_word_is_kept() -> None:
    """A decoder may strip the space before a text's first word."""
    words = ["the", "cat", "sat"]
    stream = TextStream(lambda tokens: " ".join(words[token] for token in tokens))
    assert [stream.push(token) for token in range(3)] == ["the", " cat", " sat"]


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
