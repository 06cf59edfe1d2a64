"""The thread that runs one bundle's scheduler, and the requests that wait for it.

Only this thread calls the scheduler. The event loop sends it commands, which it obeys between two
steps, and is sent what each step did.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Self

from sedac_runtime._core import (
    DecodingSetting,
    InputError,
    Progress,
    Sampling,
    Scheduler,
    SchedulerStatistics,
)
from sedac_runtime.serve.api_errors import ApiError, bad_request, engine_failed, server_busy
from sedac_runtime.serve.constraint import Constraint

Command = Callable[[], None]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SequenceRequest:
    """What `Scheduler.add` takes, and the grammar that the text follows."""

    prompt: list[int]
    decoding: DecodingSetting
    sampling: Sampling
    max_new_tokens: int
    stop_tokens: list[int]
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    logit_bias: dict[int, float] | None = None
    constraint: Constraint | None = None


class StepObserver:
    """Is told what happens in an engine thread. This one ignores it."""

    def stepped(self, statistics: SchedulerStatistics) -> None:
        """A step has ended. Called on the engine thread."""

    def progressed(
        self, progress: Progress, prompt_tokens: int, waited: float, first: bool
    ) -> None:
        """A sequence has new tokens, `waited` seconds after it was queued (`first`) or after its
        last ones. Called on the event loop, so that the next step does not wait for it."""


@dataclass(eq=False)
class _Sequence:
    batch: "Batch"
    index: int
    request: SequenceRequest
    last: float = field(default_factory=time.perf_counter)
    id: int | None = None
    has_tokens: bool = False


class EngineThread:
    """Runs a scheduler's steps as long as it has sequences.

    capacity: sequences that may run and wait at once, all requests together. cache_tokens:
    positions that all of them share.
    """

    def __init__(self, scheduler: Scheduler, observer: StepObserver, capacity: int) -> None:
        self.capacity = capacity
        self.cache_tokens = scheduler.statistics().cache_tokens
        self.failure: str | None = None
        self._scheduler = scheduler
        self._observer = observer
        self._admitted = 0
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._sequences: dict[int, _Sequence] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="sedac-engine", daemon=True)

    def start(self) -> None:
        """Start the thread; its results go to the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its step, whatever runs."""
        self._commands.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    def open(self, count: int, deadline: float) -> "Batch":
        """Room for the `count` sequences of a request, which is over at `deadline` of the loop.

        Raises ApiError when there is none, or the engines have failed.
        """
        if self.failure is not None:
            raise engine_failed(self.failure)
        if count > self.capacity:
            raise bad_request(
                f"{count} choices are more than the {self.capacity} that this server runs and"
                " queues; ask for fewer",
                "n",
            )
        if self._admitted + count > self.capacity:
            raise server_busy()
        self._admitted += count
        return Batch(self, count, deadline)

    def release(self, count: int) -> None:
        """`count` sequences have finished or will not come."""
        self._admitted -= count

    def send_start(self, sequence: _Sequence) -> None:
        """Add `sequence` before the next step."""
        self._commands.put(partial(self._start, sequence))

    def send_cancel(self, sequence: _Sequence) -> None:
        """Cancel `sequence` before the next step."""
        self._commands.put(partial(self._cancel, sequence))

    def _run(self) -> None:
        while not self._stopping:
            self._obey()
            try:
                # also with nothing left to run: the scheduler then drops what was cancelled
                self._step()
            except Exception as error:
                self._fail(error)

    def _obey(self) -> None:
        """Run the commands that have come; wait for one when there is nothing to do."""
        try:
            command = self._commands.get(block=not self._sequences)
            while True:
                command()
                command = self._commands.get_nowait()
        except Empty:
            return

    def _start(self, sequence: _Sequence) -> None:
        if self.failure is not None:
            self._publish([(sequence, engine_failed(self.failure))])
            return
        try:
            self._add(sequence, sequence.request)
        except InputError as error:
            self._publish([(sequence, bad_request(str(error), None))])
        except Exception as error:
            _LOG.exception("a sequence cannot be added")
            self._publish([(sequence, ApiError(500, str(error), type="server_error"))])

    def _add(self, sequence: _Sequence, request: SequenceRequest) -> None:
        constraint = request.constraint
        mask = None if constraint is None else constraint.mask()
        sequence.id = self._scheduler.add(
            request.prompt,
            request.decoding,
            request.sampling,
            max_new_tokens=request.max_new_tokens,
            stop_tokens=request.stop_tokens,
            top_logprobs=request.top_logprobs,
            prompt_logprobs=request.prompt_logprobs,
            logit_bias=request.logit_bias,
            constrained=mask is not None,
        )
        self._sequences[sequence.id] = sequence
        if mask is not None:
            self._scheduler.allow(sequence.id, mask)

    def _cancel(self, sequence: _Sequence) -> None:
        if sequence.id is not None and self._sequences.pop(sequence.id, None) is not None:
            self._scheduler.cancel(sequence.id)

    def _stop(self) -> None:
        self._stopping = True

    def _step(self) -> None:
        outcomes: list[tuple[_Sequence, Progress | ApiError]] = []
        for progress in self._scheduler.step():
            sequence = self._sequences.get(progress.sequence)
            if sequence is not None:
                outcomes.append((sequence, self._take(sequence, progress)))
        self._publish(outcomes)
        self._observer.stepped(self._scheduler.statistics())

    def _take(self, sequence: _Sequence, progress: Progress) -> Progress | ApiError:
        """What the client is to be told of `progress`."""
        if progress.finish_reason is not None or progress.error is not None:
            del self._sequences[progress.sequence]
        if progress.error is not None:
            return ApiError(500, progress.error, type="server_error", code="generation_failed")
        constraint = sequence.request.constraint
        if constraint is not None and progress.tokens and progress.finish_reason is None:
            return self._constrain(sequence, constraint, progress)
        return progress

    def _constrain(
        self, sequence: _Sequence, constraint: Constraint, progress: Progress
    ) -> Progress | ApiError:
        try:
            constraint.advance([token.id for token in progress.tokens])
            self._scheduler.allow(progress.sequence, constraint.mask())
        except InputError as error:
            self._cancel(sequence)
            return bad_request(str(error), "response_format")
        return progress

    def _publish(self, outcomes: Sequence[tuple[_Sequence, Progress | ApiError]]) -> None:
        if outcomes:
            self._loop.call_soon_threadsafe(self._deliver, outcomes, time.perf_counter())

    def _deliver(
        self, outcomes: Sequence[tuple[_Sequence, Progress | ApiError]], now: float
    ) -> None:
        """Hand out what came at `now`, on the event loop."""
        for sequence, outcome in outcomes:
            sequence.batch.deliver(sequence.index, outcome)
        for sequence, outcome in outcomes:
            if not isinstance(outcome, ApiError) and outcome.tokens:
                self._observe(sequence, outcome, now)

    def _observe(self, sequence: _Sequence, progress: Progress, now: float) -> None:
        prompt_tokens, first = len(sequence.request.prompt), not sequence.has_tokens
        self._observer.progressed(progress, prompt_tokens, now - sequence.last, first)
        sequence.last, sequence.has_tokens = now, True

    def _fail(self, error: Exception) -> None:
        """Answer all that runs with the reason, as all that is still sent will be."""
        _LOG.exception("a step failed")
        self.failure = " ".join(str(error).split())
        failed = engine_failed(self.failure)
        self._publish([(sequence, failed) for sequence in self._sequences.values()])
        self._sequences.clear()


class Batch:
    """The sequences of one request; iterates over (index, Progress) until all have finished.

    Iteration raises ApiError when one fails and TimeoutError after the deadline. The end of an
    `with` block cancels those that have not finished.
    """

    def __init__(self, engine: EngineThread, count: int, deadline: float) -> None:
        self._engine = engine
        self._unfinished = count
        self._sequences: dict[int, _Sequence] = {}
        # those whose reader needs no more, whatever is still queued of them
        self._left: set[int] = set()
        self._outcomes: deque[tuple[int, Progress] | Exception] = deque()
        self._have_come = asyncio.Event()
        # one timer for all tokens: a timeout around each would cost as much as decoding it
        self._timer = asyncio.get_running_loop().call_at(deadline, self._time_out)

    def start(self, requests: Sequence[SequenceRequest]) -> None:
        """Begin with the sequences, as many as there is room for."""
        self._sequences = {
            index: _Sequence(self, index, request) for index, request in enumerate(requests)
        }
        for sequence in self._sequences.values():
            self._engine.send_start(sequence)

    def finish(self, index: int) -> None:
        """Sequence `index` needs no more tokens: none of it is handed out any more."""
        self._left.add(index)
        sequence = self._sequences.pop(index, None)
        if sequence is not None:
            self._engine.send_cancel(sequence)
            self._release(1)

    def deliver(self, index: int, outcome: Progress | ApiError) -> None:
        """Take what a step did for sequence `index`, on the event loop."""
        if index not in self._sequences:
            return
        self._put(outcome if isinstance(outcome, ApiError) else (index, outcome))
        if isinstance(outcome, ApiError) or outcome.finish_reason is not None:
            del self._sequences[index]
            self._release(1)

    def close(self) -> None:
        """Cancel what has not finished."""
        self._timer.cancel()
        for index in list(self._sequences):
            self.finish(index)
        self._release(self._unfinished)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[tuple[int, Progress]]:
        while self._sequences or self._outcomes:
            await self._have_come.wait()
            progresses = self._take_progresses()
            if progresses:
                return progresses
            error = self._outcomes.popleft() if self._outcomes else None
            if isinstance(error, TimeoutError) and not self._sequences:
                # what it ran for was finished while the timeout waited behind it
                break
            if isinstance(error, Exception):
                raise error
        raise StopAsyncIteration

    def _take_progresses(self) -> list[tuple[int, Progress]]:
        """What has come up to an error."""
        progresses = []
        while self._outcomes:
            outcome = self._outcomes[0]
            if isinstance(outcome, Exception):
                break
            self._outcomes.popleft()
            if outcome[0] not in self._left:
                progresses.append(outcome)
        if not self._outcomes:
            self._have_come.clear()
        return progresses

    def _time_out(self) -> None:
        if self._unfinished:
            self._put(TimeoutError())

    def _put(self, outcome: tuple[int, Progress] | Exception) -> None:
        self._outcomes.append(outcome)
        self._have_come.set()

    def _release(self, count: int) -> None:
        self._unfinished -= count
        self._engine.release(count)
