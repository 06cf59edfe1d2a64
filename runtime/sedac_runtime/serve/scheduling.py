"""What the server needs of the core's scheduler."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from typing_extensions import Buffer

from sedac_runtime._core import DecodingSetting, Sampling


class StepToken(Protocol):
    """One token of a sequence; logprobs are natural logarithms."""

    @property
    def id(self) -> int: ...
    @property
    def exit_layer(self) -> int: ...
    @property
    def exit_reason(self) -> str: ...
    @property
    def drafted(self) -> bool: ...
    @property
    def logprob(self) -> float | None: ...
    @property
    def top_logprobs(self) -> Sequence[tuple[int, float]]: ...


class Drafts(Protocol):
    """How the drafts of a finished sequence went."""

    @property
    def drafted(self) -> int: ...
    @property
    def accepted(self) -> int: ...
    @property
    def verify_passes(self) -> int: ...


class Progress(Protocol):
    """What one step did for one sequence."""

    @property
    def sequence(self) -> int: ...
    @property
    def tokens(self) -> Sequence[StepToken]: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def cached_prompt_tokens(self) -> int: ...
    @property
    def drafts(self) -> Drafts | None: ...


class Statistics(Protocol):
    """The state of a scheduler; preemptions and prefix hits are totals."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def used_cache_tokens(self) -> int: ...
    @property
    def cache_tokens(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def prefix_hits(self) -> int: ...


class Scheduler(Protocol):
    """Sequences that are generated together."""

    def add(
        self,
        prompt: list[int],
        decoding: DecodingSetting,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop_tokens: list[int],
        top_logprobs: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        constrained: bool = False,
    ) -> int: ...
    def cancel(self, sequence: int) -> None: ...
    def allow(self, sequence: int, mask: Buffer) -> None: ...
    def step(self) -> Sequence[Progress]: ...
    def statistics(self) -> Statistics: ...
