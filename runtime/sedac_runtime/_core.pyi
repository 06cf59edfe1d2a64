import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

from numpy.typing import NDArray
from typing_extensions import Buffer

from sedac_runtime.bench_row import BenchRow
from sedac_runtime.choices import (
    Backend,
    DeviceChoice,
    Drafter,
    ExitKind,
    ExitReason,
    FinishReason,
    KvFill,
    LosslessDrafter,
    Mode,
    PolicyName,
    Verify,
)
from sedac_runtime.flavour import Device, Executor

__all__ = [
    "SCHEMA_VERSION",
    "SPELLINGS",
    "BatchDecision",
    "BenchCase",
    "BundleError",
    "BundleFiles",
    "Certification",
    "DecodingMode",
    "DecodingSetting",
    "DraftSummary",
    "EngineError",
    "FollowedText",
    "Generation",
    "GenerationSummary",
    "GraphFile",
    "InputError",
    "Model",
    "PlanTensor",
    "PolicySettings",
    "Progress",
    "Sampling",
    "Scheduler",
    "SchedulerStatistics",
    "SedacError",
    "StepThread",
    "StepToken",
    "TextStream",
    "Thresholds",
    "Token",
    "__version__",
    "exits_by_risk",
    "exits_by_stability",
    "read_manifest",
    "read_unlisted",
    "stabilities",
    "with_own_operators",
]

_Path: TypeAlias = str | os.PathLike[str]
# NumPy's arrays are buffers, which its types only say from Python 3.12 on
_Array: TypeAlias = Buffer | NDArray[Any]

SCHEMA_VERSION: int
SPELLINGS: dict[str, tuple[str, ...]]
"""What every enum's values are called, by the setting that takes them."""
__version__: str

class SedacError(Exception):
    """Base of all errors of sedac_runtime."""

class BundleError(SedacError):
    """A bundle is missing, damaged, of another schema or too large for the memory it may take."""

class InputError(SedacError):
    """A setting is out of range or a prompt cannot be used."""

class EngineError(SedacError):
    """ONNX Runtime, TensorRT or the tokenizer failed, or an engine gave NaN or infinity."""

@final
class BundleFiles:
    """A bundle's files, checked."""

    def __new__(
        cls,
        directory: _Path,
        *,
        verify: Verify = ...,
        threads: int = 0,
        replaced: _Path | None = None,
        older: bool = False,
    ) -> BundleFiles: ...
    @property
    def manifest(self) -> bytes: ...
    @property
    def engines_sha256(self) -> str: ...
    def certification(self) -> Certification: ...
    @property
    def hashed(self) -> int: ...
    @property
    def unchanged(self) -> int: ...
    def read(self, name: _Path) -> bytes: ...
    def graph(self, name: _Path) -> GraphFile: ...
    def path(self, name: _Path) -> Path: ...

@final
class GraphFile:
    """A graph, and the directory of its weights."""

    @property
    def graph(self) -> bytes: ...
    @property
    def directory(self) -> Path: ...

@final
class PolicySettings:
    """A policy and its settings, by the names that sedac_config.json has for them."""

    def __new__(
        cls,
        policy: PolicyName,
        *,
        tau: float | None = None,
        consecutive_k: int | None = None,
        min_layer_ratio: float | None = None,
        thresholds: Mapping[int, float] | None = None,
        decay: float | None = None,
        weights: Mapping[int, float] | None = None,
        targets: Mapping[int, float] | None = None,
        exit_kind: ExitKind | None = None,
    ) -> PolicySettings: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    @property
    def policy(self) -> PolicyName: ...

@final
class DecodingMode:
    """When tokens exit."""

    @staticmethod
    def full() -> DecodingMode: ...
    @staticmethod
    def exit(policy: PolicySettings, drafter: LosslessDrafter | None = None) -> DecodingMode: ...
    @staticmethod
    def lossless(drafter: LosslessDrafter) -> DecodingMode: ...
    @staticmethod
    def forced(depths: list[int]) -> DecodingMode: ...

@final
class DecodingSetting:
    """When tokens exit, and what the caches of skipped layers get."""

    def __new__(cls, mode: DecodingMode, kv_fill: KvFill = ...) -> DecodingSetting: ...
    @property
    def mode(self) -> Mode: ...
    @property
    def kv_fill(self) -> KvFill: ...
    @property
    def drafter(self) -> Drafter: ...

@final
class Sampling:
    """How tokens are chosen. The defaults are greedy."""

    def __new__(
        cls,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> Sampling: ...

@final
class PlanTensor:
    """A tensor of a plan: its name, the address of its first element, its shape, and the bytes of
    all its elements."""

    def __new__(cls, name: str, address: int, shape: list[int], bytes: int) -> PlanTensor: ...
    @property
    def name(self) -> str: ...
    @property
    def address(self) -> int: ...
    @property
    def shape(self) -> list[int]: ...
    @property
    def bytes(self) -> int: ...

@final
class Model:
    """A bundle with its engines loaded."""

    def __new__(
        cls,
        directory: _Path,
        library: _Path,
        threads: int,
        executor: Executor | None = None,
        *,
        backend: Literal["auto", "onnxruntime", "cuda"] = ...,
        device: Device | None = None,
        prepare: Callable[[Backend], Executor | None] | None = None,
        verify: Verify = ...,
        memory_limit: int | None = None,
    ) -> Model: ...
    def read_text(self, name: _Path) -> str | None: ...
    @property
    def backend(self) -> Backend: ...
    @property
    def device(self) -> DeviceChoice: ...
    @property
    def passed_over(self) -> list[tuple[str, str]]: ...
    @property
    def name(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def max_cache_length(self) -> int: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def exit_layers(self) -> list[int]: ...
    @property
    def eos_token_ids(self) -> list[int]: ...
    @property
    def has_tokenizer(self) -> bool: ...
    def decoding(
        self,
        mode: Mode,
        *,
        forced_exit: list[int] | None = None,
        policy: PolicyName | None = None,
        threshold: float | None = None,
        tau: float | None = None,
        consecutive_k: int | None = None,
        min_layer_ratio: float | None = None,
        kv_fill: KvFill | None = None,
        drafter: Drafter | None = None,
    ) -> DecodingSetting: ...
    def certification(self, decoding: DecodingSetting, sampling: Sampling) -> Certification | None:
        """What is certified of texts that are decoded so; None where their tokens are full
        depth's."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...
    def text_stream(self) -> TextStream: ...
    def follow(self, tokens: list[int], decoding: DecodingSetting) -> FollowedText: ...
    def forget_texts(self) -> None:
        """Draft the next text as a new process would, without earlier texts to look up."""

    def generate(
        self,
        prompt: list[int],
        decoding: DecodingSetting,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop_tokens: list[int],
        stop_strings: list[str] = ...,
        profile: bool = False,
    ) -> Generation: ...
    def bench(
        self,
        cases: list[BenchCase],
        prompt: list[int] | str,
        prompt_tokens: int,
        new_tokens: int,
        repeat: int,
        against: int,
    ) -> list[BenchRow]: ...

@final
class TextStream:
    """Gives the text of tokens as they come, only whole characters at a time."""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""

    def finish(self) -> str:
        """What the pieces so far lack of the whole text. Raises EngineError when the tokenizer
        fails."""

@final
class Scheduler:
    """Sequences that are generated together: they join and leave between steps. While it exists,
    sequences that have ended may keep cache slots of the model."""

    def __new__(
        cls,
        model: Model,
        *,
        max_sequences: int | None = None,
        cache_tokens: int | None = None,
        prefill_chunk: int | None = None,
    ) -> Scheduler:
        """Up to `max_sequences` run at once, None for 8, on the `cuda` backend 64 or as many as the
        GPU's memory has room for, and 1 where a backend has one slot; others wait. `cache_tokens`
        positions is what their caches may hold together, None for what the slots have. A step
        prefills up to `prefill_chunk` tokens of prompts, None for what suits the backend.
        InputError where one is below 1, BundleError where the memory does not suffice."""

    @property
    def max_sequences(self) -> int: ...
    def add(
        self,
        prompt: list[int],
        decoding: DecodingSetting,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop_tokens: list[int],
        top_logprobs: int | None = None,
        prompt_logprobs: bool = False,
        logit_bias: Mapping[int, float] | None = None,
        constrained: bool = False,
    ) -> int:
        """Queue a sequence and return its number; from any thread. With `top_logprobs` tokens come
        with their log-probabilities and those of as many most probable tokens; with
        `prompt_logprobs` the prompt's tokens too, but for the first, at full depth. `logit_bias` is
        added to the logits of its tokens. Each token of a `constrained` sequence waits for `allow`.
        InputError where the prompt cannot fit or a setting is out of range."""

    def cancel(self, sequence: int) -> None:
        """End a sequence before the next step; nothing more is reported of it. From any thread."""

    def allow(self, masks: Mapping[int, _Array]) -> None:
        """Choose the next tokens of constrained sequences, each among those whose bits are set in
        its mask: for token t, bit t % 32 of the little-endian uint32 word t // 32. Tokens beyond
        the mask are not allowed. All masks are there before the same step. From any thread.
        InputError where a mask allows no token; then none of them counts."""

    def step(self) -> list[Progress]:
        """Run one step of each sequence that can run, with the GIL released; empty where none can.
        An error ends the sequences that it concerns."""

    def start(self) -> StepThread:
        """Run steps on a thread that does without the GIL, while there is something to do."""

    def statistics(self) -> SchedulerStatistics:
        """How it stands, as of the end of the last step."""

@final
class StepThread:
    """Steps a scheduler, and keeps what that gives until it is taken; where that is not, it waits
    after a few steps. It ends once nothing refers to this any more."""

    def fileno(self) -> int:
        """A descriptor that can be read while there is something to take, and once the thread has
        ended; for an event loop."""

    def take(self) -> list[Progress]:
        """What steps have given since the last time, in their order, without waiting for any.
        RuntimeError once a step has panicked, which was the last."""

    def stop(self) -> None:
        """End the thread after its step, and wait for that."""

@final
class Progress:
    """What one step did for one sequence: its new tokens, how its drafts went since it was last
    reported and, at its end, why it ended, or the error that ended it. `prompt_logprobs` has the
    next tokens of its prompt, from the second on, where they were asked for: for each the natural
    logarithm of its probability, and the most probable tokens with theirs. `cached_prompt_tokens`
    is the number of tokens of its prompt that did not have to be prefilled, `waited` the seconds
    from when it was added or last had tokens to the end of the step."""

    @property
    def sequence(self) -> int: ...
    @property
    def tokens(self) -> list[StepToken]: ...
    @property
    def prompt_logprobs(self) -> list[tuple[float, list[tuple[int, float]]]]: ...
    @property
    def finish_reason(self) -> FinishReason | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def cached_prompt_tokens(self) -> int: ...
    @property
    def waited(self) -> float: ...
    @property
    def drafts(self) -> DraftSummary: ...

@final
class StepToken:
    """One token of a sequence: its id, the layers executed and why no more, and whether it was
    drafted and accepted. Where they were asked for, the natural logarithm of its probability by the
    model's own logits, and the most probable tokens with theirs, the most probable first."""

    @property
    def id(self) -> int: ...
    @property
    def exit_layer(self) -> int: ...
    @property
    def exit_reason(self) -> ExitReason: ...
    @property
    def drafted(self) -> bool: ...
    @property
    def logprob(self) -> float | None: ...
    @property
    def top_logprobs(self) -> list[tuple[int, float]]: ...

@final
class SchedulerStatistics:
    """How a scheduler stands: sequences that run and that wait, cache positions in use and in
    total, how often a sequence had to give up its cache to be recomputed later, how many sequences
    began with tokens that a cache held, and these tokens."""

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
    @property
    def prefix_tokens(self) -> int: ...

@final
class BenchCase:
    """A decoding mode to measure, and the name of its row."""

    def __new__(cls, name: str, mode: DecodingMode, *, monolith: bool = False) -> BenchCase: ...

@final
class Generation:
    """Yields tokens as they are generated, from when the first is asked for. Threads that read it
    take turns."""

    def __iter__(self) -> Generation: ...
    def __next__(self) -> Token: ...
    def close(self) -> None: ...
    def finish(self) -> None:
        """Generate what is left, whose tokens are given in the summary only."""

    @property
    def certification(self) -> Certification | None: ...
    def summary(self) -> GenerationSummary: ...

@final
class Token:
    """One generated token: its id, the text it completes, the layers executed, and why no more."""

    @property
    def id(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def exit_layer(self) -> int: ...
    @property
    def exit_reason(self) -> ExitReason: ...

@final
class GenerationSummary:
    """A finished generation: its tokens, why it ended, times in milliseconds, text that no token
    completed, and its drafts."""

    @property
    def tokens(self) -> list[Token]: ...
    @property
    def finish_reason(self) -> FinishReason: ...
    @property
    def prefill_ms(self) -> float: ...
    @property
    def decode_ms(self) -> float: ...
    @property
    def rest(self) -> str: ...
    @property
    def profile(self) -> str | None: ...
    @property
    def drafts(self) -> DraftSummary: ...

@final
class DraftSummary:
    """How the drafts of a generation went; all zero when nothing was drafted."""

    @property
    def drafted(self) -> int: ...
    @property
    def accepted(self) -> int: ...
    @property
    def verify_passes(self) -> int: ...
    @property
    def draft_depths(self) -> dict[int, int]: ...

@final
class FollowedText:
    """A text run with exits: the most probable token at each position but the first, and the layers
    executed."""

    @property
    def tokens(self) -> list[int]: ...
    @property
    def exit_layers(self) -> list[int]: ...

@final
class Certification:
    """What is certified of tokens that exit, or why lossless mode's may not be full depth's; as a
    string, one sentence."""

    @property
    def certificate(self) -> dict[str, Any] | None: ...

@final
class BatchDecision:
    """Where n tokens exit that go through the layers together."""

    def __new__(
        cls, policy: PolicySettings, num_layers: int, exit_layers: list[int], full_depth: _Array
    ) -> BatchDecision: ...
    def reads_risk(self, depth: int) -> bool: ...
    def reads_exit_head(self, depth: int) -> bool: ...
    def observe(
        self,
        depth: int,
        stability: _Array,
        risk: _Array | None = None,
        exit_signals: _Array | None = None,
    ) -> None: ...
    @property
    def exit_layers(self) -> memoryview[int]: ...
    @property
    def exited(self) -> memoryview[bool]: ...
    @property
    def skip_from(self) -> memoryview[int]: ...

@final
class Thresholds:
    """Thresholds by depth that threads read and move without locks."""

    def __new__(cls, values: dict[int, float]) -> Thresholds: ...
    def get(self, depth: int) -> float | None: ...
    def follow(self, depth: int, risks: _Array, exit_rate: float, step: float) -> float: ...

def stabilities(before: _Array, after: _Array) -> list[float]:
    """The stability of a layer for each token, as where the host computes it.

    before, after: float32 [tokens, hidden], the residual stream before the layer and after it.
    Raises InputError for other shapes.
    """

def exits_by_stability(
    stability: _Array, tau: float, consecutive_k: int, min_layer_ratio: float
) -> list[int]: ...
def exits_by_risk(risks: _Array, thresholds: Thresholds, layers: int) -> list[int]: ...
def read_manifest(directory: _Path) -> bytes:
    """The text of bundle.json in `directory`, which has its digest and a schema that is known."""

def with_own_operators(graph: bytes) -> bytes | None:
    """The graph `graph`, an ONNX file, as the CPU backend runs layers: with operators of its own,
    which this library gives ONNX Runtime (`register_custom_ops_library`). None where it runs as it
    is."""

def read_unlisted(directory: _Path, name: _Path) -> bytes | None:
    """The text of the file `name` of the bundle in `directory`, None where there is none."""
