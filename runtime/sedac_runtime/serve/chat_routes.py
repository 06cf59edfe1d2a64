"""/v1/chat/completions."""

from collections.abc import Collection
from contextlib import aclosing

from fastapi import APIRouter, Request, Response

from sedac_runtime.serve.chat_request import ChatRequest
from sedac_runtime.serve.choice_text import ChoiceUpdate, merge, sedac_choice, token_logprobs
from sedac_runtime.serve.preparation import prepare_chat
from sedac_runtime.serve.response_bodies import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    MadeToolCall,
    MessageDelta,
    SedacChoice,
)
from sedac_runtime.serve.responses import (
    DONE,
    Events,
    Exchange,
    event_of,
    stream,
    unless_disconnected,
)
from sedac_runtime.serve.routing import ANSWERS, begin, new_id, now
from sedac_runtime.serve.token_text import StopFilter
from sedac_runtime.serve.tool_format import ToolFormat

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ANSWERS)
async def chat(request: Request, body: ChatRequest) -> Response | ChatCompletion:
    """Answer the last message of a chat."""
    writer = _ChatWriter(begin(request, body, prepare_chat), body)
    if body.stream:
        return await stream(request, writer.events(), writer.exchange.deadline)
    return await unless_disconnected(request, writer.collect())


class Message:
    """Separates what a model says from the tools that it calls. names: of the functions that it may
    call. most_calls: calls after these are dropped; None for no limit."""

    def __init__(
        self, tools: ToolFormat | None, names: Collection[str], most_calls: int | None
    ) -> None:
        self._tools = tools
        self._names = names
        self._most_calls = most_calls
        self._said = StopFilter([] if tools is None else [tools.opening])
        self._written = ""
        self._said_length = 0

    def push(self, update: ChoiceUpdate) -> tuple[str, list[MadeToolCall]]:
        """More of the text; with the last update also the calls."""
        text = self._said.push(update.text)
        self._written += update.text
        self._said_length += len(text)
        if update.finish_reason is None:
            return text, []
        rest = self._written[self._said_length :]
        calls = None
        if self._tools is not None and self._said.stopped:
            calls = self._tools.parse(rest, self._names)
        return (text, calls[: self._most_calls]) if calls else (text + rest, [])


class _ChatWriter:
    def __init__(self, exchange: Exchange, body: ChatRequest) -> None:
        self.exchange = exchange
        self._body = body
        self._id, self._created = new_id("chatcmpl"), now()
        names = {function.name for function in body.functions}
        tools = exchange.model.tool_format if names else None
        most_calls = 1 if body.parallel_tool_calls is False else None
        self._messages = [Message(tools, names, most_calls) for _ in range(exchange.count)]
        self._begun: set[int] = set()

    async def collect(self) -> ChatCompletion:
        updates = await self.exchange.collect()
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self.exchange.model.name,
            choices=[self._choice(index, merge(parts)) for index, parts in enumerate(updates)],
            usage=self.exchange.usage,
        )

    async def events(self) -> Events:
        async with aclosing(self.exchange.updates()) as updates:
            async for index, update in updates:
                choice = self._chunk_choice(index, update)
                if choice is not None:
                    yield event_of(self._chunk([choice]))
        if self._body.streams_usage:
            yield event_of(self._chunk([], with_usage=True))
        yield DONE

    def _choice(self, index: int, update: ChoiceUpdate) -> ChatChoice:
        text, calls = self._messages[index].push(update)
        reason = update.finish_reason
        assert reason is not None
        return ChatChoice(
            index=index,
            message=AssistantMessage(
                content=text or (None if calls else ""), tool_calls=calls or None
            ),
            logprobs=self._logprobs(update),
            finish_reason="tool_calls" if calls else reason,
            sedac=self._sedac(update),
        )

    def _chunk(self, choices: list[ChatChunkChoice], *, with_usage: bool = False) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self.exchange.model.name,
            choices=choices,
            usage=self.exchange.usage if with_usage else None,
        )

    def _chunk_choice(self, index: int, update: ChoiceUpdate) -> ChatChunkChoice | None:
        """What the stream says of `update`; None for nothing."""
        text, calls = self._messages[index].push(update)
        shows_tokens = self._body.sedac is not None or bool(self._body.logprobs)
        if not (text or update.finish_reason or shows_tokens):
            return None
        first = index not in self._begun
        self._begun.add(index)
        for position, call in enumerate(calls):
            call.index = position
        delta = MessageDelta(
            role="assistant" if first else None,
            content=text if text or first else None,
            tool_calls=calls or None,
        )
        return ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._logprobs(update),
            finish_reason="tool_calls" if calls else update.finish_reason,
            sedac=self._sedac(update),
        )

    def _logprobs(self, update: ChoiceUpdate) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return ChatLogprobs(content=token_logprobs(self.exchange.model, update))

    def _sedac(self, update: ChoiceUpdate) -> SedacChoice | None:
        return None if self._body.sedac is None else sedac_choice(update)
