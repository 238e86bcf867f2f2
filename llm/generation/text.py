"""Tokens to text as they come. Generation floor."""

from collections.abc import Callable, Iterable, Sequence

_HALF = "\N{REPLACEMENT CHARACTER}"  # what decoders put for bytes that are no character (yet)


class TextStream:
    """Turns tokens into text piece by piece; the pieces joined are the text of all the tokens.

    A character may be spread over several tokens: its bytes are held back until it is whole.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []  # from the start of the last piece given on
        self._given = 0  # how many of those have been given out as text

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that these tokens complete; it may be empty."""
        return "".join(self._push(i) for i in ids)

    def finish(self) -> str:
        """Return what is left: bytes that never became a character, as U+FFFD."""
        return self._take(whole=True)

    def _push(self, token: int) -> str:
        self._ids.append(token)
        return self._take(whole=False)

    def _take(self, *, whole: bool) -> str:
        # The piece before goes along: some decoders treat the start of a text in their own way.
        before, text = self._decode(self._ids[: self._given]), self._decode(self._ids)
        if len(text) <= len(before) or (text.endswith(_HALF) and not whole):
            return ""
        self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        return text[len(before) :]
