"""The thread between requests and the scheduler, with a scheduler that tests step."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sedac_runtime import _core
from sedac_runtime.serve.api_errors import ApiError
from sedac_runtime.serve.engine_thread import Batch, EngineThread, SequenceRequest, StepObserver
from serve.fake_scheduler import FakeScheduler

pytestmark = pytest.mark.anyio

FULL = _core.DecodingSetting(_core.DecodingMode.full())
MANY = 10_000


class Recorder(StepObserver):
    def __init__(self) -> None:
        self.first: list[bool] = []

    def progressed(self, progress: Any, prompt_tokens: int, first: bool) -> None:
        self.first.append(first)


@asynccontextmanager
async def running(
    scheduler: FakeScheduler, capacity: int = 4, observer: StepObserver | None = None
) -> AsyncIterator[EngineThread]:
    engine = EngineThread(scheduler, observer or StepObserver(), capacity)
    engine.start()
    try:
        yield engine
    finally:
        scheduler.steps.release(MANY)
        await engine.stop()


def request(*prompt: int, tokens: int = 3, **settings: Any) -> SequenceRequest:
    return SequenceRequest(list(prompt), FULL, _core.Sampling(), tokens, [], **settings)


def later(seconds: float = 60.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def ids(batch: Batch) -> dict[int, list[int]]:
    """The tokens of each sequence."""
    seen: dict[int, list[int]] = {}
    async for progresses in batch:
        for index, progress in progresses:
            seen.setdefault(index, []).extend(token.id for token in progress.tokens)
    return seen


async def test_sequences_of_a_request_are_told_apart() -> None:
    scheduler, recorder = FakeScheduler(), Recorder()
    scheduler.steps.release(MANY)
    async with running(scheduler, observer=recorder) as engine:
        with engine.open(2, later()) as batch:
            batch.start([request(10), request(20, tokens=2)])
            assert await ids(batch) == {0: [11, 12, 13], 1: [21, 22]}
    assert recorder.first == [True, True, False, False, False]


async def test_a_slow_reader_takes_what_several_steps_gave() -> None:
    scheduler, recorder = FakeScheduler(), Recorder()
    scheduler.steps.release(MANY)
    async with running(scheduler, observer=recorder) as engine:
        with engine.open(2, later()) as batch:
            batch.start([request(10), request(20, tokens=2)])
            while len(recorder.first) < 5:
                await asyncio.sleep(0.001)
            tokens = [progress.tokens[0].id for _, progress in await anext(batch)]
            assert sorted(tokens) == [11, 12, 13, 21, 22]
            with pytest.raises(StopAsyncIteration):
                await anext(batch)


async def test_more_than_there_is_room_for_is_refused_until_there_is_room() -> None:
    scheduler = FakeScheduler()
    async with running(scheduler, capacity=2) as engine:
        with engine.open(2, later()) as batch:
            batch.start([request(1), request(2)])
            with pytest.raises(ApiError) as busy:
                engine.open(1, later())
            scheduler.steps.release(MANY)
            await ids(batch)
            with engine.open(2, later()):
                pass
        with pytest.raises(ApiError) as impossible:
            engine.open(3, later())
    assert busy.value.status_code == 429
    assert busy.value.headers == {"Retry-After": "1"}
    assert impossible.value.status_code == 400
    assert impossible.value.body.error.param == "n"


async def test_leaving_cancels_before_the_next_step() -> None:
    scheduler = FakeScheduler()
    async with running(scheduler) as engine:
        with engine.open(1, later()) as batch:
            batch.start([request(1, tokens=MANY)])
            scheduler.steps.release()
            assert await anext(batch)
        with engine.open(1, later()) as batch:
            batch.start([request(5, tokens=1)])
            # one step that had begun, and one that the new sequence is in
            scheduler.steps.release(2)
            assert await ids(batch) == {0: [6]}
    assert scheduler.cancelled == [1]


async def test_one_of_two_sequences_may_be_finished() -> None:
    scheduler = FakeScheduler()
    async with running(scheduler) as engine:
        with engine.open(2, later()) as batch:
            batch.start([request(1, tokens=MANY), request(5, tokens=MANY)])
            scheduler.steps.release()
            assert {index for index, _ in await anext(batch)} == {0, 1}
            batch.finish(0)
            scheduler.steps.release()
            assert {index for index, _ in await anext(batch)} == {1}
            with engine.open(3, later()):
                pass
    assert scheduler.cancelled == [1, 2]


async def test_nothing_that_is_queued_of_a_finished_sequence_is_handed_out() -> None:
    scheduler = FakeScheduler()
    async with running(scheduler) as engine:
        with engine.open(2, later()) as batch:
            # the first has ended, and the second not, before any of them is read
            batch.start([request(1, tokens=3), request(5, tokens=MANY)])
            scheduler.steps.release(6)
            while len(scheduler.running.get(2, [])) < 7:
                await asyncio.sleep(0.01)
            batch.finish(0)
            assert {index for index, _ in await anext(batch)} == {1}


async def test_the_deadline_ends_the_wait() -> None:
    scheduler = FakeScheduler()
    async with running(scheduler) as engine:
        with engine.open(1, later(0.05)) as batch, pytest.raises(TimeoutError):
            batch.start([request(1)])
            await anext(batch)
    assert scheduler.cancelled == [1]


async def test_the_deadline_ends_the_wait_for_more_tokens() -> None:
    scheduler = FakeScheduler()
    scheduler.steps.release()
    async with running(scheduler) as engine:
        with engine.open(1, later(0.05)) as batch:
            batch.start([request(1)])
            await anext(batch)
            with pytest.raises(TimeoutError):
                await anext(batch)


async def test_a_text_that_is_finished_when_the_deadline_is_seen_has_not_timed_out() -> None:
    scheduler = FakeScheduler()
    scheduler.steps.release()
    async with running(scheduler) as engine:
        with engine.open(1, later(0.05)) as batch:
            batch.start([request(1)])
            await asyncio.sleep(0.1)
            ((index, _),) = await anext(batch)
            batch.finish(index)
            with pytest.raises(StopAsyncIteration):
                await anext(batch)


async def test_what_has_finished_by_the_deadline_is_handed_out_after_it() -> None:
    scheduler = FakeScheduler()
    scheduler.steps.release(MANY)
    async with running(scheduler) as engine:
        with engine.open(1, later(0.2)) as batch:
            batch.start([request(1)])
            await asyncio.sleep(0.3)
            assert await ids(batch) == {0: [2, 3, 4]}


@pytest.mark.parametrize(
    ("prompt", "status", "words"),
    [(FakeScheduler.REFUSED, 400, "no room"), (FakeScheduler.BROKEN, 500, "NaN")],
)
async def test_one_sequence_may_fail(prompt: int, status: int, words: str) -> None:
    scheduler = FakeScheduler()
    scheduler.steps.release(MANY)
    async with running(scheduler) as engine:
        with engine.open(1, later()) as other, engine.open(1, later()) as batch:
            other.start([request(1)])
            with pytest.raises(ApiError, match=words) as failed:
                batch.start([request(prompt)])
                await ids(batch)
            assert await ids(other) == {0: [2, 3, 4]}
        assert failed.value.status_code == status
        with engine.open(4, later()):
            pass


async def test_a_step_that_fails_is_the_answer_to_all() -> None:
    scheduler = FakeScheduler()
    async with running(scheduler) as engine:
        with engine.open(2, later()) as batch, engine.open(1, later()) as late:
            batch.start([request(1), request(FakeScheduler.CRASH)])
            scheduler.steps.release(MANY)
            with pytest.raises(ApiError, match="the device is lost") as failed:
                await ids(batch)
            with pytest.raises(ApiError, match="the device is lost"):
                late.start([request(1)])
        with pytest.raises(ApiError, match="restart the server") as refused:
            engine.open(1, later())
    assert failed.value.status_code == refused.value.status_code == 503


class Alternating:
    """Allows tokens 7 and 8 in turn, as a constraint."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def mask(self) -> bytes:
        return (1 << (7 + len(self.seen) % 2)).to_bytes(4, "little")

    def advance(self, tokens: list[int]) -> None:
        self.seen += tokens
        if len(self.seen) == 5:
            raise _core.InputError("the text cannot follow the schema (too long); simplify it")


async def test_a_constraint_is_told_before_each_token() -> None:
    scheduler, constraint = FakeScheduler(), Alternating()
    scheduler.steps.release(MANY)
    async with running(scheduler) as engine:
        with engine.open(1, later()) as batch:
            batch.start([request(1, tokens=4, constraint=constraint)])
            assert await ids(batch) == {0: [7, 8, 7, 8]}


class Slow(Alternating):
    """Computes its second mask once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may = threading.Event()

    def mask(self) -> bytes:
        if self.seen:
            self.may.wait()
        return super().mask()


async def test_nobody_else_waits_for_a_mask() -> None:
    scheduler, constraint = FakeScheduler(), Slow()
    scheduler.steps.release(MANY)
    async with running(scheduler) as engine:
        with engine.open(1, later()) as slow, engine.open(1, later()) as batch:
            slow.start([request(1, tokens=2, constraint=constraint)])
            assert await anext(slow)
            batch.start([request(1)])
            assert await ids(batch) == {0: [2, 3, 4]}
            constraint.may.set()
            assert await ids(slow) == {0: [8]}


async def test_masks_of_a_step_are_given_in_one_call() -> None:
    scheduler = FakeScheduler()
    async with running(scheduler) as engine:
        with engine.open(2, later()) as batch:
            batch.start([request(1, constraint=Alternating()) for _ in range(2)])
            while len(scheduler.allowed) < 2:
                await asyncio.sleep(0.001)
            scheduler.steps.release(3)
            assert await ids(batch) == {0: [7, 8, 7], 1: [7, 8, 7]}
    assert scheduler.allowed == [{1}, {2}, {1, 2}, {1, 2}]


class Panic(BaseException):
    """What a library in Rust raises that panics."""


@pytest.mark.parametrize("kind", [ValueError, Panic])
async def test_a_sequence_whose_mask_cannot_be_computed_ends(kind: type[BaseException]) -> None:
    class Broken(Alternating):
        def mask(self) -> bytes:
            raise kind("out of luck")

    scheduler = FakeScheduler()
    scheduler.steps.release(MANY)
    async with running(scheduler) as engine:
        with engine.open(1, later()) as batch:
            batch.start([request(1, constraint=Broken())])
            with pytest.raises(ApiError, match="out of luck") as failed:
                await ids(batch)
    assert failed.value.status_code == 500


async def test_masks_that_the_core_refuses_end_their_sequences() -> None:
    class Refusing(FakeScheduler):
        def allow(self, masks: dict[int, bytes]) -> None:
            raise _core.InputError("no token is allowed")

    scheduler = Refusing()
    scheduler.steps.release(MANY)
    async with running(scheduler) as engine:
        with engine.open(1, later()) as batch:
            batch.start([request(1, constraint=Alternating())])
            with pytest.raises(ApiError, match="no token is allowed"):
                await ids(batch)


async def test_a_constraint_that_fails_ends_its_sequence() -> None:
    scheduler, constraint = FakeScheduler(), Alternating()
    scheduler.steps.release(MANY)
    async with running(scheduler) as engine:
        with engine.open(1, later()) as batch:
            batch.start([request(1, tokens=9, constraint=constraint)])
            with pytest.raises(ApiError, match="too long") as failed:
                await ids(batch)
    assert failed.value.body.error.param == "response_format"
    assert scheduler.cancelled == [1]
