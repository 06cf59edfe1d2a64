"""Streams whose clients misbehave."""

import asyncio
from typing import Any

import pytest
from starlette.types import Message, Scope

from sedac_runtime.serve.responses import Events, EventStream


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
