"""Requests of one bundle, and the thread of the core that steps its scheduler.

That thread never holds the GIL: it steps on while the event loop, on which all else here runs,
hands out what has come.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from sedac_runtime._core import (
    DecodingSetting,
    InputError,
    Progress,
    Sampling,
    Scheduler,
)
from sedac_runtime.serve.api_errors import ApiError, bad_request, engine_failed, server_busy
from sedac_runtime.serve.constraint import Constraint

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
    """Is told what sequences are given. This one ignores it."""

    def progressed(self, progress: Progress, prompt_tokens: int, first: bool) -> None:
        """A sequence has new tokens, its `first` or more. Called on the event loop."""


@dataclass(eq=False)
class _Sequence:
    number: int
    batch: "Batch"
    index: int
    request: SequenceRequest
    has_tokens: bool = False

    def deliver(self, outcome: Progress | ApiError) -> None:
        self.batch.deliver(self.index, outcome)


class EngineThread:
    """Hands sequences to the thread that steps a scheduler, and what that gives to their requests.

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
        self._sequences: dict[int, _Sequence] = {}
        # not the loop's own executor, where masks would wait for requests that are prepared
        self._masks = ThreadPoolExecutor(1, "sedac-masks")

    def start(self) -> None:
        """Start the thread; its results go to the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread = self._scheduler.start()
        self._loop.add_reader(self._thread, self._take)

    async def stop(self) -> None:
        """End the thread after its step, whatever runs."""
        self._loop.remove_reader(self._thread)
        await asyncio.to_thread(self._thread.stop)
        await asyncio.to_thread(self._masks.shutdown, cancel_futures=True)

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

    def add(self, batch: "Batch", index: int, request: SequenceRequest) -> _Sequence:
        """Begin with a sequence of `batch` in the next step. Raises ApiError."""
        if self.failure is not None:
            raise engine_failed(self.failure)
        try:
            number = self._scheduler.add(
                request.prompt,
                request.decoding,
                request.sampling,
                max_new_tokens=request.max_new_tokens,
                stop_tokens=request.stop_tokens,
                top_logprobs=request.top_logprobs,
                prompt_logprobs=request.prompt_logprobs,
                logit_bias=request.logit_bias,
                constrained=request.constraint is not None,
            )
        except Exception as error:
            raise _refusal(error, None) from error
        sequence = self._sequences[number] = _Sequence(number, batch, index, request)
        if request.constraint is not None:
            self._constrain([(sequence, [])])
        return sequence

    def cancel(self, sequence: _Sequence) -> None:
        """End `sequence` before the next step."""
        if self._sequences.pop(sequence.number, None) is not None:
            self._scheduler.cancel(sequence.number)

    def _take(self) -> None:
        """Hand out what steps have given."""
        try:
            progresses = self._thread.take()
        except Exception as error:
            self._fail(error)
            return
        constrained = []
        for progress in progresses:
            sequence = self._sequences.get(progress.sequence)
            if sequence is None:
                continue
            self._hand_out(sequence, progress)
            is_constrained = sequence.request.constraint is not None
            if is_constrained and progress.tokens and not _is_last(progress):
                constrained.append((sequence, [token.id for token in progress.tokens]))
        if constrained:
            self._constrain(constrained)

    def _hand_out(self, sequence: _Sequence, progress: Progress) -> None:
        if _is_last(progress):
            del self._sequences[sequence.number]
        if progress.error is not None:
            sequence.deliver(
                ApiError(500, progress.error, type="server_error", code="generation_failed")
            )
            return
        sequence.deliver(progress)
        if progress.tokens:
            prompt_tokens, first = len(sequence.request.prompt), not sequence.has_tokens
            self._observer.progressed(progress, prompt_tokens, first)
            sequence.has_tokens = True

    def _constrain(self, grown: list[tuple[_Sequence, list[int]]]) -> None:
        """Have sequences that have grown by these tokens go on, while all others do."""
        self._loop.run_in_executor(self._masks, self._allow, grown)

    def _allow(self, grown: list[tuple[_Sequence, list[int]]]) -> None:
        masks = {}
        for sequence, tokens in grown:
            constraint = sequence.request.constraint
            assert constraint is not None
            try:
                constraint.advance(tokens)
                masks[sequence.number] = constraint.mask()
            # whatever it is, also a panic of the grammar's library: the others go on
            except BaseException as error:
                self._refuse_later(sequence, error)
        try:
            # in one call, so that the same step has all of them
            self._scheduler.allow(masks)
        except BaseException as error:
            for sequence, _ in grown:
                self._refuse_later(sequence, error)

    def _refuse_later(self, sequence: _Sequence, error: BaseException) -> None:
        refusal = _refusal(error, "response_format")
        self._loop.call_soon_threadsafe(self._refuse, sequence, refusal)

    def _refuse(self, sequence: _Sequence, refusal: ApiError) -> None:
        self.cancel(sequence)
        sequence.deliver(refusal)

    def _fail(self, error: Exception) -> None:
        """Answer all that runs with the reason, as all that is still sent will be."""
        _LOG.error("a step failed", exc_info=error)
        self.failure = " ".join(str(error).split())
        self._loop.remove_reader(self._thread)
        for sequence in self._sequences.values():
            sequence.deliver(engine_failed(self.failure))
        self._sequences.clear()


def _is_last(progress: Progress) -> bool:
    return progress.finish_reason is not None or progress.error is not None


def _refusal(error: BaseException, param: str | None) -> ApiError:
    """What a client is told of a sequence that cannot begin or go on."""
    if isinstance(error, InputError):
        return bad_request(str(error), param)
    _LOG.error("a sequence cannot run", exc_info=error)
    return ApiError(500, str(error), type="server_error")


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
        """Begin with the sequences, as many as there is room for. Raises ApiError."""
        for index, request in enumerate(requests):
            self._sequences[index] = self._engine.add(self, index, request)

    def finish(self, index: int) -> None:
        """Sequence `index` needs no more tokens: none of it is handed out any more."""
        self._left.add(index)
        sequence = self._sequences.pop(index, None)
        if sequence is not None:
            self._engine.cancel(sequence)
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
