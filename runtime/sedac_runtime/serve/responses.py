"""Run the sequences of a request, and send what they give as one response or as a stream."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from sedac_runtime._core import Progress
from sedac_runtime.serve.api_errors import ApiError, client_gone, timed_out
from sedac_runtime.serve.choice_text import ChoiceText, ChoiceUpdate, merge
from sedac_runtime.serve.preparation import Work
from sedac_runtime.serve.request_fields import GenerationRequest
from sedac_runtime.serve.response_bodies import CachedTokens, Usage
from sedac_runtime.serve.served_model import ServedModel
from sedac_runtime.serve.server_settings import ServerSettings

T = TypeVar("T")
Updates = AsyncGenerator[tuple[int, ChoiceUpdate], None]
Events = AsyncGenerator[str, None]

# a client that reads no more may hold its connection for so long after the deadline, in seconds
_GRACE = 5.0
DONE = "data: [DONE]\n\n"


@dataclass
class Exchange:
    """A request in progress. work and choices: once it is prepared."""

    model: ServedModel
    body: GenerationRequest
    count: int
    prepare: Callable[[], Work]
    settings: ServerSettings
    log: dict[str, Any]

    def __post_init__(self) -> None:
        self._begun = asyncio.get_running_loop().time()
        self.deadline = self._begun + self.settings.request_timeout
        self.work = Work([], [])
        self.choices: list[ChoiceText] = []
        self._drafted = self._accepted = 0

    async def updates(self) -> Updates:
        """(choice, update) as they come. Raises ApiError."""
        with self.model.engine.open(self.count, self.deadline) as batch:
            try:
                async with asyncio.timeout_at(self.deadline):
                    self.work = await asyncio.to_thread(self.prepare)
                self._begin()
                batch.start(self.work.sequences)
                async for progresses in batch:
                    for index, update in self._advance(progresses):
                        if update.finish_reason is not None:
                            batch.finish(index)
                            self._log_finish(update)
                        yield index, update
            except TimeoutError:
                raise timed_out(self.settings.request_timeout) from None

    def _advance(self, progresses: list[tuple[int, Progress]]) -> list[tuple[int, ChoiceUpdate]]:
        """One update of each choice that has progressed."""
        updates: dict[int, list[ChoiceUpdate]] = {}
        for index, progress in progresses:
            of_choice = updates.setdefault(index, [])
            if not of_choice or of_choice[-1].finish_reason is None:
                of_choice.append(self.choices[index].push(progress))
        merged = [(index, merge(of_choice)) for index, of_choice in updates.items()]
        if "first_token_ms" not in self.log and any(update.tokens for _, update in merged):
            waited = asyncio.get_running_loop().time() - self._begun
            self.log["first_token_ms"] = round(waited * 1e3, 1)
        return merged

    async def collect(self) -> list[list[ChoiceUpdate]]:
        """Every choice's updates. Raises ApiError."""
        collected: list[list[ChoiceUpdate]] = [[] for _ in range(self.count)]
        async with aclosing(self.updates()) as updates:
            async for index, update in updates:
                collected[index].append(update)
        return collected

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        prompt, repeated = self.work.prompt_tokens, self.body.n or 1
        completion = sum(choice.completion_tokens for choice in self.choices)
        cached = sum(choice.cached_prompt_tokens for choice in self.choices[::repeated])
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=CachedTokens(cached_tokens=cached),
        )

    def _begin(self) -> None:
        self.log["prompt_tokens"] = self.work.prompt_tokens
        self.log["mode"] = self.work.sequences[0].decoding.mode
        repeated = self.body.n or 1
        for index, sequence in enumerate(self.work.sequences):
            prompt = self.work.prompts[index // repeated]
            choice = ChoiceText(
                self.model,
                sequence,
                self.body.stops,
                prompt,
                only_prompt=self.body.max_tokens == 0,
            )
            self.choices.append(choice)

    def _log_finish(self, update: ChoiceUpdate) -> None:
        self.log.setdefault("finish_reasons", []).append(update.finish_reason)
        tokens = sum(choice.completion_tokens for choice in self.choices)
        self.log["completion_tokens"] = tokens
        if tokens:
            layers = sum(choice.layers for choice in self.choices)
            self.log["mean_exit_layer"] = round(layers / tokens, 2)
        if update.summary is not None:
            self._drafted += update.summary.drafted
            self._accepted += update.summary.accepted
        if self._drafted:
            self.log["acceptance_rate"] = round(self._accepted / self._drafted, 3)


class EventStream(StreamingResponse):
    """Server-sent events, which are closed however the response ends."""

    def __init__(self, events: Events, deadline: float) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events
        self._deadline = deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; end the connection of a client that does not read them."""
        async with aclosing(self._events):
            try:
                async with asyncio.timeout_at(self._deadline + _GRACE):
                    await super().__call__(scope, receive, send)
            except TimeoutError:
                scope["state"]["log"]["error"] = "the client does not read the stream"


async def stream(request: Request, events: Events, deadline: float) -> EventStream:
    """The response that sends `events`. What is refused before the first of them raises."""
    first = await unless_disconnected(request, anext(events))
    return EventStream(_continued(first, events, request.state.log), deadline)


async def _continued(first: str, events: Events, log: dict[str, Any]) -> Events:
    """`first` and then `events`; an error is an event, as the status has been sent."""
    async with aclosing(events):
        yield first
        try:
            async for event in events:
                yield event
        except ApiError as error:
            # not the message, which may have words of the text
            log["error"] = error.body.error.code or error.body.error.type
            yield event_of(error.body)


def event_of(body: BaseModel) -> str:
    """A server-sent event."""
    return f"data: {body.model_dump_json()}\n\n"


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; it is cancelled when the client goes, as is the request."""
    running, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((running, gone), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        raise client_gone()
    finally:
        for task in (running, gone):
            task.cancel()
        await asyncio.gather(running, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
