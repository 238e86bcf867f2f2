"""Streams of text never show half a character, and lose nothing."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llm.generation.text import TextStream


def decode(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def test_the_bytes_of_a_character_wait_for_the_last_of_them():
    stream = TextStream(decode)
    pieces = [stream.push([byte]) for byte in "a€😀é".encode()]
    assert pieces == ["a", "", "", "€", "", "", "", "😀", "", "é"]
    assert stream.finish() == ""


def test_bytes_that_never_become_a_character_come_at_the_end():
    stream = TextStream(decode)
    assert stream.push(b"ok\xe2\x82") == "ok"
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_wrong_byte_does_not_stop_the_stream():
    stream = TextStream(decode)
    assert stream.push(b"\xff") == ""
    assert stream.push(b"b") == "\N{REPLACEMENT CHARACTER}b"


def test_decoders_that_treat_the_start_of_a_text_apart_see_what_stands_before():
    words = {0: "▁Hello", 1: "▁world", 2: "!"}

    def metaspace(ids):  # as SentencePiece: the first space of a text is none
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    stream = TextStream(metaspace)
    assert [stream.push([i]) for i in (0, 1, 2)] == ["Hello", " world", "!"]


@settings(deadline=None)
@given(st.text(max_size=30), st.lists(st.integers(1, 5), max_size=40))
def test_pieces_joined_are_the_text(text, sizes):
    data, stream, pieces = text.encode(), TextStream(decode), []
    for size in [*sizes, len(data) + 1]:
        pieces.append(stream.push(data[:size]))
        data = data[size:]
    pieces.append(stream.finish())
    assert "".join(pieces) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
