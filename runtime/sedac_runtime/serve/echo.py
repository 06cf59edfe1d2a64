"""Prompts, and what `echo` repeats of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from sedac_runtime._core import TextStream


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, and the text that `echo` repeats. is_scored: whether the log probabilities
    of the tokens are wanted, too."""

    tokens: list[int]
    echoed: str = ""
    is_scored: bool = False


@dataclass(frozen=True)
class PromptToken:
    """A token of an echoed prompt, and how many characters precede it. Nothing says how probable
    the first one is: its logprob is None."""

    id: int
    offset: int
    logprob: float | None
    top_logprobs: list[tuple[int, float]]


class ScoredPrompt:
    """Gives the tokens of a prompt as their log probabilities come; none where it is not scored."""

    def __init__(self, prompt: Prompt, stream: TextStream) -> None:
        self._tokens = iter(prompt.tokens if prompt.is_scored else ())
        self._stream = stream
        self._offset = 0
        self._length = len(prompt.echoed)
        self._begun = False

    def push(self, logprobs: Sequence[tuple[float, list[tuple[int, float]]]]) -> list[PromptToken]:
        """The tokens that `logprobs` are of, and before them the first."""
        known: list[tuple[float | None, list[tuple[int, float]]]] = [*logprobs]
        if not self._begun:
            known.insert(0, (None, []))
            self._begun = True
        return [
            self._take(token, logprob, top)
            for (logprob, top), token in zip(known, self._tokens, strict=False)
        ]

    def _take(self, token: int, logprob: float | None, top: list[tuple[int, float]]) -> PromptToken:
        # a tokenizer may write a text differently from how it was given
        offset = min(self._offset, self._length)
        self._offset += len(self._stream.push(token))
        return PromptToken(token, offset, logprob, top)
