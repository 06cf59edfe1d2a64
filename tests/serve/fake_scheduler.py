"""A scheduler whose sequences say the tokens that tests tell them to."""

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

    A prompt of [REFUSED] is refused, one of [BROKEN] fails, [CRASH] makes the step raise.
    """

    REFUSED, BROKEN, CRASH = -1, -2, -3

    def __init__(self) -> None:
        self.running: dict[int, list[int]] = {}
        self.left: dict[int, int] = {}
        self.constrained: dict[int, bytes | None] = {}
        self.cancelled: list[int] = []
        self.threads: set[int] = set()
        self.steps = threading.Semaphore(0)
        self._next = 0

    def add(self, prompt: list[int], *_: Any, max_new_tokens: int, **settings: Any) -> int:
        self.threads.add(threading.get_ident())
        if prompt == [self.REFUSED]:
            raise InputError("prompt: no room")
        self._next += 1
        self.running[self._next] = list(prompt)
        self.left[self._next] = max_new_tokens
        if settings["constrained"]:
            self.constrained[self._next] = None
        return self._next

    def cancel(self, sequence: int) -> None:
        self.threads.add(threading.get_ident())
        self.cancelled.append(sequence)
        self.running.pop(sequence)

    def allow(self, sequence: int, mask: bytes) -> None:
        self.constrained[sequence] = mask

    def step(self) -> list[FakeProgress]:
        """A step; where there is something to run, it waits until tests release `steps`."""
        self.threads.add(threading.get_ident())
        if self.running:
            self.steps.acquire()
        return [self._progress(sequence) for sequence in list(self.running)]

    def statistics(self) -> FakeStatistics:
        return FakeStatistics(running=len(self.running))

    def _progress(self, sequence: int) -> FakeProgress:
        tokens = self.running[sequence]
        if tokens[-1] == self.CRASH:
            raise RuntimeError("the device is lost")
        if tokens[-1] == self.BROKEN:
            del self.running[sequence]
            return FakeProgress(sequence, error="logits of position 1 are NaN")
        mask = self.constrained.get(sequence)
        tokens.append(tokens[-1] + 1 if mask is None else _first_bit(mask))
        self.left[sequence] -= 1
        finished = self.left[sequence] == 0
        if finished:
            del self.running[sequence]
        reason = "length" if finished else None
        return FakeProgress(sequence, [FakeToken(tokens[-1])], reason)


def _first_bit(mask: bytes) -> int:
    bits = int.from_bytes(mask, "little")
    return (bits & -bits).bit_length() - 1
