"""The text of a sequence as its tokens come."""

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Gives the text of tokens as they come, only whole characters at a time.

    decode: the text of tokens. A token's text may depend on those before it, so the newest ones
    are decoded together with those that gave the last piece.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._context = 0
        self._read = 0
        self._emitted = ""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._tokens.append(token)
        known = self._decode(self._tokens[self._context : self._read])
        text = self._decode(self._tokens[self._context :])
        if len(text) <= len(known) or text.endswith(_UNFINISHED) or not text.startswith(known):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        piece = text[len(known) :]
        self._emitted += piece
        return piece

    def finish(self) -> str:
        """What the pieces so far lack of the whole text."""
        whole = self._decode(self._tokens)
        same = 0
        for ours, theirs in zip(whole, self._emitted, strict=False):
            if ours != theirs:
                break
            same += 1
        return whole[same:]


class StopFilter:
    """Ends a text before the first stop string.

    A piece that may be the beginning of one is held back until it is known whether it is.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is certain to precede any stop string; none after one was found."""
        if not self._stops:
            return piece
        if self.stopped:
            return ""
        self._held += piece
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        kept = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - kept
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def finish(self) -> str:
        """The text that was held back, now that no more comes."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the text that `stop` begins with."""
        longest = min(len(self._held), len(stop) - 1)
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if self._held.endswith(stop[:n])), 0)
