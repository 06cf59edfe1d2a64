"""Streams whose clients misbehave, and updates of several steps."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message, Scope

from sedac_runtime.serve.choice_text import ChoiceUpdate
from sedac_runtime.serve.responses import Events, EventStream, Exchange


@pytest.mark.anyio
async def test_a_stream_that_is_not_read_ends_after_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sedac_runtime.serve.responses._GRACE", 0.0)
    closed = asyncio.Event()

    async def events() -> Events:
        try:
            while True:
                yield "data: more\n\n"
        finally:
            closed.set()

    async def never_ready(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def still_connected() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    log: dict[str, Any] = {}
    scope: Scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "state": {"log": log}}
    response = EventStream(events(), asyncio.get_running_loop().time())
    await response(scope, still_connected, never_ready)
    assert log["error"] == "the client does not read the stream"
    assert closed.is_set()


@pytest.mark.anyio
async def test_an_update_has_what_came_up_to_the_end_of_its_choice() -> None:
    class Choice:
        """Ends with its second step."""

        def __init__(self) -> None:
            self.steps = 0

        def push(self, _: Any) -> ChoiceUpdate:
            self.steps += 1
            return ChoiceUpdate(str(self.steps), finish_reason="stop" if self.steps == 2 else None)

    settings: Any = SimpleNamespace(request_timeout=1.0)
    unused: Any = None
    exchange = Exchange(unused, unused, 1, unused, settings, {})
    choices: Any = [Choice(), Choice()]
    exchange.choices = choices
    progresses = [(0, unused), (1, unused), (0, unused), (0, unused)]
    updates = [(i, u.text, u.finish_reason) for i, u in exchange._advance(progresses)]
    assert updates == [(0, "12", "stop"), (1, "1", None)]
