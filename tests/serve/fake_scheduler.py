"""A scheduler whose sequences say the tokens that tests tell them to."""

import socket
import threading
from dataclasses import dataclass, field
from typing import Any

from sedac_runtime import InputError


@dataclass
class FakeToken:
    id: int
    exit_layer: int = 3
    exit_reason: str = "full_depth"
    drafted: bool = False
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class FakeDrafts:
    drafted: int = 0
    accepted: int = 0
    verify_passes: int = 0


@dataclass
class FakeProgress:
    sequence: int
    tokens: list[FakeToken] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    cached_prompt_tokens: int = 0
    drafts: FakeDrafts = field(default_factory=FakeDrafts)
    prompt_logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    waited: float = 0.25


@dataclass
class FakeStatistics:
    running: int = 0
    waiting: int = 0
    used_cache_tokens: int = 0
    cache_tokens: int = 100
    preemptions: int = 0
    prefix_hits: int = 0


class FakeScheduler:
    """Counts each prompt up, a token a step, until `max_new_tokens`.

    A prompt of [REFUSED] is refused, one of [BROKEN] fails, [CRASH] makes the step panic. A step
    waits until tests release `steps`.
    """

    REFUSED, BROKEN, CRASH = -1, -2, -3

    def __init__(self) -> None:
        self.running: dict[int, list[int]] = {}
        self.left: dict[int, int] = {}
        self.masks: dict[int, bytes | None] = {}
        self.allowed: list[set[int]] = []
        self.cancelled: list[int] = []
        self.steps = threading.Semaphore(0)
        self.changed = threading.Condition()
        self._next = 0

    def add(self, prompt: list[int], *_: Any, max_new_tokens: int, **settings: Any) -> int:
        if prompt == [self.REFUSED]:
            raise InputError("prompt: no room")
        with self.changed:
            self._next += 1
            self.running[self._next] = list(prompt)
            self.left[self._next] = max_new_tokens
            if settings["constrained"]:
                self.masks[self._next] = None
            self.changed.notify_all()
            return self._next

    def cancel(self, sequence: int) -> None:
        with self.changed:
            self.cancelled.append(sequence)
            self.running.pop(sequence, None)

    def allow(self, masks: dict[int, bytes]) -> None:
        with self.changed:
            self.allowed.append(set(masks))
            self.masks.update(masks)
            self.changed.notify_all()

    def start(self) -> "FakeStepThread":
        return FakeStepThread(self)

    def statistics(self) -> FakeStatistics:
        return FakeStatistics(running=len(self.running))

    def can_run(self) -> list[int]:
        """Sequences that do not wait for a mask."""
        return [each for each in self.running if self.masks.get(each, b"") is not None]

    def step(self) -> list[FakeProgress]:
        return [self._progress(sequence) for sequence in self.can_run()]

    def _progress(self, sequence: int) -> FakeProgress:
        tokens = self.running[sequence]
        if tokens[-1] == self.CRASH:
            raise RuntimeError("the device is lost")
        if tokens[-1] == self.BROKEN:
            del self.running[sequence]
            return FakeProgress(sequence, error="logits of position 1 are NaN")
        mask = self.masks.get(sequence)
        tokens.append(tokens[-1] + 1 if mask is None else _first_bit(mask))
        if mask is not None:
            self.masks[sequence] = None
        self.left[sequence] -= 1
        finished = self.left[sequence] == 0
        if finished:
            del self.running[sequence]
        reason = "length" if finished else None
        return FakeProgress(sequence, [FakeToken(tokens[-1])], reason)


class FakeStepThread:
    """Steps a fake scheduler while it has sequences that can run."""

    def __init__(self, scheduler: FakeScheduler) -> None:
        self._scheduler = scheduler
        self._progress: list[FakeProgress] = []
        self._failure: RuntimeError | None = None
        self._stopping = False
        self._ready, self._signal = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._ready.fileno()

    def take(self) -> list[FakeProgress]:
        with self._scheduler.changed:
            self._ready.recv(1)
            progress, self._progress = self._progress, []
            if not progress and self._failure is not None:
                raise self._failure
            return progress

    def stop(self) -> None:
        with self._scheduler.changed:
            self._stopping = True
            self._scheduler.changed.notify_all()
        self._thread.join()
        self._ready.close()
        self._signal.close()

    def _run(self) -> None:
        changed = self._scheduler.changed
        while True:
            with changed:
                changed.wait_for(lambda: self._stopping or self._scheduler.can_run())
            if self._stopping:
                return
            self._scheduler.steps.acquire()
            with changed:
                if not self._put():
                    return

    def _put(self) -> bool:
        """Keep what a step gives. False where it panics."""
        try:
            progress = self._scheduler.step()
        except RuntimeError as error:
            self._failure = error
            self._signal.send(b"\0")
            return False
        if progress and not self._progress:
            self._signal.send(b"\0")
        self._progress += progress
        return True


def _first_bit(mask: bytes) -> int:
    bits = int.from_bytes(mask, "little")
    return (bits & -bits).bit_length() - 1
