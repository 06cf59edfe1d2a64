"""/v1/completions."""

from contextlib import aclosing

from fastapi import APIRouter, Request, Response

from sedac_runtime.serve.choice_text import ChoiceUpdate, completion_logprobs, merge, sedac_choice
from sedac_runtime.serve.preparation import prepare_completion
from sedac_runtime.serve.request_fields import CompletionRequest
from sedac_runtime.serve.response_bodies import Completion, CompletionChoice, CompletionLogprobs
from sedac_runtime.serve.responses import (
    DONE,
    Events,
    Exchange,
    event_of,
    stream,
    unless_disconnected,
)
from sedac_runtime.serve.routing import ANSWERS, begin, new_id, now

router = APIRouter()


@router.post("/v1/completions", response_model=Completion, responses=ANSWERS)
async def complete(request: Request, body: CompletionRequest) -> Response | Completion:
    """Continue a text."""
    writer = _CompletionWriter(begin(request, body, prepare_completion), body)
    if body.stream:
        return await stream(request, writer.events(), writer.exchange.deadline)
    return await unless_disconnected(request, writer.collect())


class _CompletionWriter:
    def __init__(self, exchange: Exchange, body: CompletionRequest) -> None:
        self.exchange = exchange
        self._body = body
        self._id, self._created = new_id("cmpl"), now()

    async def collect(self) -> Completion:
        updates = await self.exchange.collect()
        choices = [self._choice(index, merge(parts)) for index, parts in enumerate(updates)]
        return self._completion(choices, with_usage=True)

    async def events(self) -> Events:
        async with aclosing(self.exchange.updates()) as updates:
            async for index, update in updates:
                if update.text or update.finish_reason or self._shows_tokens:
                    yield event_of(self._completion([self._choice(index, update)]))
        if self._body.streams_usage:
            yield event_of(self._completion([], with_usage=True))
        yield DONE

    @property
    def _shows_tokens(self) -> bool:
        return self._body.sedac is not None or self._body.logprobs is not None

    def _completion(
        self, choices: list[CompletionChoice], *, with_usage: bool = False
    ) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self.exchange.model.name,
            choices=choices,
            usage=self.exchange.usage if with_usage else None,
        )

    def _choice(self, index: int, update: ChoiceUpdate) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=update.text,
            logprobs=self._logprobs(update),
            finish_reason=update.finish_reason,
            sedac=None if self._body.sedac is None else sedac_choice(update),
        )

    def _logprobs(self, update: ChoiceUpdate) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        return completion_logprobs(self.exchange.model, update)
