"""The text of one choice of a response, and what was seen of its tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from sedac_runtime._core import DraftSummary, Progress, StepToken
from sedac_runtime.serve.echo import Prompt, PromptToken, ScoredPrompt
from sedac_runtime.serve.engine_thread import SequenceRequest
from sedac_runtime.serve.response_bodies import (
    ChoiceFinish,
    CompletionLogprobs,
    SedacChoice,
    SedacSummary,
    SedacToken,
    TokenLogprob,
    TopLogprob,
)
from sedac_runtime.serve.served_model import ServedModel
from sedac_runtime.serve.token_text import StopFilter


@dataclass(frozen=True)
class SeenToken:
    """A token, the text that it completes, and how many characters precede that."""

    token: StepToken
    text: str
    offset: int


@dataclass
class ChoiceUpdate:
    """What some steps did for a choice. text: all that is certain to precede a stop string. prompt:
    echoed tokens whose log probabilities are wanted."""

    text: str = ""
    prompt: list[PromptToken] = field(default_factory=list)
    tokens: list[SeenToken] = field(default_factory=list)
    finish_reason: ChoiceFinish | None = None
    summary: SedacSummary | None = None


class ChoiceText:
    """Turns the progress of one sequence into text.

    prompt: what the choice begins with, as `echo` asks for. only_prompt: no tokens are wanted after
    it.
    """

    def __init__(
        self,
        model: ServedModel,
        sequence: SequenceRequest,
        stops: list[str],
        prompt: Prompt,
        *,
        only_prompt: bool = False,
    ) -> None:
        self.completion_tokens = 0
        self.cached_prompt_tokens = 0
        self._model = model
        self._sequence = sequence
        self._stream = model.text_stream()
        self._filter = StopFilter(stops)
        self._before = prompt.echoed
        self._prompt = ScoredPrompt(prompt, model.text_stream())
        self._only_prompt = only_prompt
        self._offset = len(prompt.echoed)
        self._drafted = self._accepted = self._verify_passes = 0
        self.layers = 0

    def push(self, progress: Progress) -> ChoiceUpdate:
        """The next update. It is the last one if it has a finish_reason."""
        update = ChoiceUpdate(self._before, self._prompt.push(progress.prompt_logprobs))
        self._before = ""
        self.cached_prompt_tokens = max(self.cached_prompt_tokens, progress.cached_prompt_tokens)
        self._count(progress.drafts)
        for token in () if self._only_prompt else progress.tokens:
            self._take(token, update)
            if self._filter.stopped:
                break
        if self._only_prompt:
            update.finish_reason = None if progress.finish_reason is None else "length"
        elif not self._filter.stopped and progress.finish_reason is not None:
            update.text += self._filter.push(self._stream.finish()) + self._filter.finish()
            update.finish_reason = "stop" if progress.finish_reason == "stop" else "length"
        # also by what no token had completed
        if self._filter.stopped:
            update.finish_reason = "stop"
        if update.finish_reason is not None:
            update.summary = self._summary()
        return update

    def _take(self, token: StepToken, update: ChoiceUpdate) -> None:
        piece = self._stream.push(token.id)
        update.tokens.append(SeenToken(token, piece, self._offset))
        update.text += self._filter.push(piece)
        self._offset += len(piece)
        self.layers += token.exit_layer
        self.completion_tokens += 1

    def _count(self, drafts: DraftSummary) -> None:
        self._drafted += drafts.drafted
        self._accepted += drafts.accepted
        self._verify_passes += drafts.verify_passes

    def _summary(self) -> SedacSummary:
        decoding, sampling = self._sequence.decoding, self._sequence.sampling
        return SedacSummary(
            mode=decoding.mode,
            drafter=decoding.drafter,
            kv_fill=decoding.kv_fill,
            num_layers=self._model.core.num_layers,
            mean_exit_layer=self.layers / max(self.completion_tokens, 1),
            drafted=self._drafted,
            accepted=self._accepted,
            verify_passes=self._verify_passes,
            certification=self._model.certification(decoding, sampling),
        )


def merge(updates: list[ChoiceUpdate]) -> ChoiceUpdate:
    """A choice's updates as one."""
    return ChoiceUpdate(
        text="".join(update.text for update in updates),
        prompt=[token for update in updates for token in update.prompt],
        tokens=[token for update in updates for token in update.tokens],
        finish_reason=updates[-1].finish_reason,
        summary=updates[-1].summary,
    )


def sedac_choice(update: ChoiceUpdate) -> SedacChoice:
    """What `sedac` of a choice says."""
    tokens = [
        SedacToken(
            id=seen.token.id,
            text=seen.text,
            exit_layer=seen.token.exit_layer,
            exit_reason=seen.token.exit_reason,
            drafted=seen.token.drafted,
        )
        for seen in update.tokens
    ]
    return SedacChoice(tokens=tokens, summary=update.summary)


def token_logprobs(model: ServedModel, update: ChoiceUpdate) -> list[TokenLogprob]:
    """The log probabilities of an update's tokens."""
    return [_token_logprob(model, seen.token) for seen in update.tokens]


class _Scored(Protocol):
    """A token of a prompt, or a new one."""

    @property
    def id(self) -> int: ...
    @property
    def logprob(self) -> float | None: ...
    @property
    def top_logprobs(self) -> list[tuple[int, float]]: ...


def completion_logprobs(model: ServedModel, update: ChoiceUpdate) -> CompletionLogprobs:
    """The log probabilities of an update's tokens, and of those that it echoes."""
    logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token, offset in _scored(update):
        logprobs.tokens.append(_text(model, token.id))
        logprobs.token_logprobs.append(token.logprob)
        logprobs.top_logprobs.append(_by_text(model, token))
        logprobs.text_offset.append(offset)
    return logprobs


def _scored(update: ChoiceUpdate) -> Iterator[tuple[_Scored, int]]:
    """Tokens, each with the characters that precede it."""
    for prompt_token in update.prompt:
        yield prompt_token, prompt_token.offset
    for seen in update.tokens:
        yield seen.token, seen.offset


def _by_text(model: ServedModel, token: _Scored) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    logprobs: dict[str, float] = {}
    # the token itself, too, which may be less probable than the others
    for other, logprob in [*token.top_logprobs, (token.id, token.logprob)]:
        # parts of characters look alike: the most probable one counts
        logprobs.setdefault(_text(model, other), logprob)
    return logprobs


def _text(model: ServedModel, token: int) -> str:
    return model.token_bytes(token).decode("utf-8", errors="replace")


def _token_logprob(model: ServedModel, token: StepToken) -> TokenLogprob:
    most_probable = [_top_logprob(model, *entry) for entry in token.top_logprobs]
    own = _top_logprob(model, token.id, token.logprob or 0.0)
    return TokenLogprob(**own.model_dump(), top_logprobs=most_probable)


def _top_logprob(model: ServedModel, token: int, logprob: float) -> TopLogprob:
    data = model.token_bytes(token)
    text = data.decode("utf-8", errors="replace")
    return TopLogprob(token=text, logprob=logprob, bytes=list(data))
