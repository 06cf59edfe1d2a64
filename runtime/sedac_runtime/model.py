"""SedacModel: a loaded bundle, with an interface like that of a transformers model."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

from sedac_runtime import _core
from sedac_runtime.bench_row import BenchRow
from sedac_runtime.chat import FILES as CHAT_FILES
from sedac_runtime.chat import ChatTemplates, Message
from sedac_runtime.choices import (
    Backend,
    BackendChoice,
    DeviceChoice,
    Drafter,
    KvFill,
    Mode,
    PolicyName,
    Verify,
)
from sedac_runtime.cuda_libraries import load_cuda_libraries
from sedac_runtime.flavour import Executor
from sedac_runtime.library import default_threads, find_onnxruntime
from sedac_runtime.ranges import LARGEST_SEED, MOST_THREADS, check_count, token_ids

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenOutput:
    """One generated token.

    text: what the token completes. exit_layer: layers executed, with soft exits those before the
    decision. exit_reason: why the token stopped there.
    """

    id: int
    text: str
    exit_layer: int
    exit_reason: str

    @classmethod
    def of(cls, token: _core.Token) -> "TokenOutput":
        """The core's token."""
        return cls(token.id, token.text, token.exit_layer, token.exit_reason)


@dataclass(frozen=True)
class GenerationOutput:
    """A finished generation, with the fields of `generate --json`.

    tokens, exit_layers (as a token's) and exit_reasons have one entry for each token. prefill_ms
    lasts until the first token; decode_ms and decode_tokens_per_second are for the others.

    With a drafter, `drafted` tokens were proposed and `accepted` of them confirmed in
    `verify_passes` passes; draft_depths counts the drafts by the number of layers they ran, 0 for
    prompt lookup. Without one they are 0 and empty. In mode "exit" a draft may contain tokens that
    exited; they are counted too.

    certificate: the bundle's, if it covers the setting of this generation, else None.
    certification: one sentence on what is certified, or why lossless mode is not exact on this CPU;
    None where all tokens are full depth's.
    """

    text: str
    tokens: list[int]
    exit_layers: list[int]
    num_layers: int
    mean_exit_layer: float
    exit_reasons: list[str]
    mode: Mode
    kv_fill: str
    drafter: Drafter
    prompt_tokens: int
    prefill_ms: float
    decode_ms: float
    decode_tokens_per_second: float
    finish_reason: str
    drafted: int
    accepted: int
    verify_passes: int
    draft_depths: dict[int, int]
    certificate: dict[str, Any] | None
    certification: str | None


class GenerationStream:
    """Iterates over TokenOutputs as they are generated; `output` is the finished generation.

    The model is in use from the request for the first token until the last one. `close`, the end of
    a `with` block, leaving the loop and garbage collection of the stream release it at once. An
    unread stream stays a few tokens ahead of its reader; another generation on the same model waits
    until it has finished. Several threads may read one stream, each with an iterator of its own.
    """

    def __init__(
        self,
        generation: _core.Generation,
        decoding: _core.DecodingSetting,
        prompt_tokens: int,
        num_layers: int,
    ) -> None:
        self._generation = generation
        self._decoding = decoding
        self._prompt_tokens = prompt_tokens
        self._num_layers = num_layers

    def __iter__(self) -> Iterator[TokenOutput]:
        try:
            for token in self._generation:
                yield TokenOutput.of(token)
        finally:
            self.close()

    def __enter__(self) -> "GenerationStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the generation. Does nothing if it has finished."""
        self._generation.close()

    @cached_property
    def output(self) -> GenerationOutput:
        """The finished generation; generates the remaining tokens first.

        Raises RuntimeError if the stream was closed before the end.
        """
        try:
            self._generation.finish()
        finally:
            self.close()
        return self._collect()

    @property
    def rest(self) -> str:
        """Text after the last complete token, such as an incomplete character."""
        _ = self.output
        return self._generation.summary().rest

    @property
    def profile(self) -> str | None:
        """A Chrome trace of every step and engine, as JSON; None without `profile=True`."""
        _ = self.output
        return self._generation.summary().profile

    def _collect(self) -> GenerationOutput:
        summary, decoding = self._generation.summary(), self._decoding
        tokens, drafts = summary.tokens, summary.drafts
        layers = [token.exit_layer for token in tokens]
        decoded = len(layers) - 1
        certification = self._generation.certification
        return GenerationOutput(
            text="".join(token.text for token in tokens) + summary.rest,
            tokens=[token.id for token in tokens],
            exit_layers=layers,
            num_layers=self._num_layers,
            mean_exit_layer=sum(layers) / len(layers),
            exit_reasons=[token.exit_reason for token in tokens],
            mode=decoding.mode,
            kv_fill=decoding.kv_fill,
            drafter=decoding.drafter,
            prompt_tokens=self._prompt_tokens,
            prefill_ms=summary.prefill_ms,
            decode_ms=summary.decode_ms,
            decode_tokens_per_second=decoded / summary.decode_ms * 1e3 if decoded else 0.0,
            finish_reason=summary.finish_reason,
            drafted=drafts.drafted,
            accepted=drafts.accepted,
            verify_passes=drafts.verify_passes,
            draft_depths=drafts.draft_depths,
            certificate=certification and certification.certificate,
            certification=certification and str(certification),
        )


class SedacModel:
    """A bundle with its engines loaded. One sequence is generated at a time.

    chat_templates: what renders chats.
    """

    def __init__(self, bundle: Path, core: _core.Model) -> None:
        self.bundle = bundle
        self._core = core
        # now: whoever edits a bundle puts another in its place
        texts = {name: core.read_text(name) for name in CHAT_FILES}
        self.chat_templates = ChatTemplates(bundle, texts)

    @classmethod
    def from_pretrained(
        cls,
        bundle: str | Path,
        *,
        threads: int | None = None,
        backend: BackendChoice = "onnxruntime",
        device: DeviceChoice | None = None,
        verify: Verify = "always",
        memory_limit: int | None = None,
    ) -> "SedacModel":
        """Check and load the bundle in directory `bundle`.

        threads: fixed for the process by the first bundle loaded; None uses all processors.
        backend: "onnxruntime" runs the engines on the CPU, or with device "cuda" the bundle's
        graphs for GPUs; "cuda" runs the bundle's kernels, "tensorrt" and "tensorrt-rtx" its plans
        for that target. All of these take the first NVIDIA GPU. "auto" is the first that can run of
        "cuda", TensorRT, "onnxruntime" on the GPU and on the CPU; the log says which it is, and in
        warnings why no better one.
        device: where "onnxruntime" runs; None for the CPU.
        verify: "always" hashes every file, "changed" skips files whose size, time of
        modification and inode are those of their last successful check.
        memory_limit: bytes for engines and KV cache; None for the available memory.

        Raises BundleError when the bundle is damaged, does not fit into memory or has no engines
        for the backend, EngineError when ONNX Runtime, its CUDA provider, TensorRT or the GPU's
        driver fails.
        """
        _check_backend(backend, device)
        count = default_threads() if threads is None else threads
        check_count("threads", count, 1, MOST_THREADS)
        if memory_limit is not None:
            check_count("memory_limit", memory_limit, 1, LARGEST_SEED)
        path, library = Path(bundle), find_onnxruntime()
        executor: Executor | None = None
        runner: Literal["auto", "onnxruntime", "cuda"] = "onnxruntime"
        if backend == "tensorrt" or backend == "tensorrt-rtx":
            from sedac_runtime.tensorrt import PlanExecutor

            executor = PlanExecutor(backend, path)
        else:
            runner = backend
        if device == "cuda":
            load_cuda_libraries(library)
        core = _core.Model(
            path,
            library,
            count,
            executor,
            backend=runner,
            device="cuda" if device == "cuda" else None,
            prepare=partial(_prepare, path, library),
            verify=verify,
            memory_limit=memory_limit,
        )
        if backend == "auto":
            _log_choice(core)
        return cls(path, core)

    @property
    def core(self) -> _core.Model:
        """The core's model."""
        return self._core

    @property
    def backend(self) -> Backend:
        """What runs the bundle."""
        return self._core.backend

    @property
    def device(self) -> DeviceChoice:
        """Where it runs: on the CPU or on the first NVIDIA GPU ("cuda")."""
        return self._core.device

    @property
    def passed_over(self) -> list[tuple[str, str]]:
        """The better backends that "auto" could not take, the best first, each with the reason."""
        return self._core.passed_over

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return self._core.num_layers

    @property
    def tolerance(self) -> float:
        """The maximum difference from the original model that the build allowed; see
        `sedac_runtime.tolerance`."""
        return self._core.tolerance

    @property
    def eos_token_ids(self) -> list[int]:
        """End-of-text tokens."""
        return self._core.eos_token_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the model expects.

        Raises InputError when the bundle has no tokenizer, or for lone surrogates.
        """
        try:
            return self._core.encode(text)
        except UnicodeEncodeError as error:
            raise _core.InputError(
                f"the text has a lone surrogate at character {error.start}; give Unicode text"
            ) from error

    def encode_chat(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a chat, rendered with the bundle's chat template.

        tools: functions that the model may call, as the template expects them. Raises InputError
        when the bundle has no tokenizer or no template for these messages.
        """
        prompt = self.chat_templates.render(messages, tools)
        return self._core.encode(prompt, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without special tokens.

        Raises InputError when the bundle has no tokenizer, or a token is no number of one.
        """
        ids = token_ids(tokens)
        for token in ids:
            check_count("token", token, 0)
        return self._core.decode(ids)

    def generate(self, prompt: str | Sequence[int], **settings: object) -> GenerationOutput:
        """Generate to the end. The arguments are those of `stream`."""
        return self.stream(prompt, **settings).output  # type: ignore[arg-type]

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        mode: Mode = "lossless",
        policy: PolicyName | None = None,
        threshold: float | None = None,
        tau: float | None = None,
        consecutive_k: int | None = None,
        min_layer_ratio: float | None = None,
        kv_fill: KvFill | None = None,
        drafter: Drafter | None = None,
        forced_exit: Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        profile: bool = False,
    ) -> GenerationStream:
        """Continue `prompt`, a text or token ids; tokens are generated as the stream is read.

        mode: "lossless" gives full depth's tokens by speculative decoding: `drafter` proposes
        tokens by early exit ("early-exit"), from the text so far ("prompt-lookup") or by whichever
        has the higher expected speedup ("auto", the default), and full depth verifies several in
        one pass. "full" runs every layer for every token. "exit" lets tokens exit by `policy`; a
        drafter other than "none" then proposes tokens that the policy does not let exit, and while
        drafts await verification, deeper exits are left to full depth.

        policy, in mode "exit": "stability" exits after `consecutive_k` consecutive layers with a
        stability of at least `tau`, not before `min_layer_ratio` of the layers have run; "probe"
        and "cascade" by the entropy probes' risk; "margin" and "learned" by the exit engines; at
        the bundle's thresholds, or at `threshold` for every depth. kv_fill: the caches of skipped
        layers are computed from the hidden state at the exit ("propagate"), or in full together
        with the next token that goes deeper ("defer", which drafters need). None stands for the
        value in the bundle's sedac_config.json.

        forced_exit: depths taken in turn, one for each token; it exits at the first exit layer from
        there on, whatever the policy. temperature 0 is greedy. A text ends with one of
        `stop_tokens` (None for the model's end-of-text tokens) or with the token that completes one
        of `stop_strings`, of which a plain string is one. profile: record a Chrome trace, the
        stream's `profile`.

        Raises InputError when a setting is out of range or the prompt does not fit, at the latest
        when the first token is requested.
        """
        tokens = self.encode(prompt) if isinstance(prompt, str) else token_ids(prompt)
        stops = self.eos_token_ids if stop_tokens is None else list(stop_tokens)
        if consecutive_k is not None:
            check_count("consecutive_k", consecutive_k, 1, self.num_layers)
        for token in (*tokens, *stops):
            check_count("token", token, 0)
        for depth in forced_exit or ():
            check_count("forced_exit", depth, 1)
        check_count("max_new_tokens", max_new_tokens, 1)
        check_count("top_k", top_k, 0)
        check_count("seed", seed, 0, LARGEST_SEED)
        decoding = self._core.decoding(
            mode,
            forced_exit=None if forced_exit is None else list(forced_exit),
            policy=policy,
            threshold=threshold,
            tau=tau,
            consecutive_k=consecutive_k,
            min_layer_ratio=min_layer_ratio,
            kv_fill=kv_fill,
            drafter=drafter,
        )
        sampling = _core.Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        generation = self._core.generate(
            tokens,
            decoding,
            sampling,
            max_new_tokens=max_new_tokens,
            stop_tokens=stops,
            stop_strings=[stop_strings] if isinstance(stop_strings, str) else list(stop_strings),
            profile=profile,
        )
        return GenerationStream(generation, decoding, len(tokens), self.num_layers)

    def follow(
        self,
        text: str | Sequence[int],
        *,
        policy: PolicyName | None = None,
        threshold: float | None = None,
        tau: float | None = None,
        consecutive_k: int | None = None,
        min_layer_ratio: float | None = None,
        kv_fill: KvFill | None = None,
    ) -> tuple[list[int], list[int]]:
        """Run a given text token by token in mode "exit".

        Returns the argmax token and the layers executed, for each token of the text but the first.
        Settings and errors are those of `stream`.
        """
        tokens = self.encode(text) if isinstance(text, str) else token_ids(text)
        if consecutive_k is not None:
            check_count("consecutive_k", consecutive_k, 1, self.num_layers)
        for token in tokens:
            check_count("token", token, 0)
        decoding = self._core.decoding(
            "exit",
            policy=policy,
            threshold=threshold,
            tau=tau,
            consecutive_k=consecutive_k,
            min_layer_ratio=min_layer_ratio,
            kv_fill=kv_fill,
            drafter="none",
        )
        followed = self._core.follow(tokens, decoding)
        return followed.tokens, followed.exit_layers

    def measure(
        self,
        cases: Sequence[_core.BenchCase],
        prompt: str | Sequence[int],
        *,
        prompt_tokens: int,
        new_tokens: int,
        repeat: int,
        against: int,
    ) -> list[BenchRow]:
        """What `sedac_runtime.bench` measures, case by case, after the first `prompt_tokens` tokens
        of `prompt`; `against` is the index of the case to compare with. Raises InputError.
        """
        start = prompt if isinstance(prompt, str) else token_ids(prompt)
        return self._core.bench(list(cases), start, prompt_tokens, new_tokens, repeat, against)


def _check_backend(backend: BackendChoice, device: DeviceChoice | None) -> None:
    known = ("auto", *_core.SPELLINGS["backend"])
    if backend not in known:
        raise _core.InputError(f"backend {backend} is out of range: {' or '.join(known)}")
    if device not in (None, *get_args(DeviceChoice)):
        raise _core.InputError(f"device {device} is out of range: cpu or cuda")
    if device is not None and backend != "onnxruntime":
        raise _core.InputError(
            f"device {device} belongs to backend onnxruntime, and backend {backend} has its own;"
            " leave it out"
        )


def _prepare(bundle: Path, library: Path, backend: Backend) -> Executor | None:
    """What `backend` needs before "auto" tries it on a GPU. Raises EngineError."""
    if backend == "tensorrt" or backend == "tensorrt-rtx":
        from sedac_runtime.tensorrt import PlanExecutor

        return PlanExecutor(backend, bundle)
    load_cuda_libraries(library)
    return None


def _log_choice(core: _core.Model) -> None:
    """Log what backend "auto" has chosen; without any handler, warnings appear on stderr."""
    level = logging.WARNING if core.passed_over else logging.INFO
    _LOG.log(level, "backend auto: %s on %s", core.backend, core.device)
    for backend, reason in core.passed_over:
        _LOG.warning("backend auto: not %s: %s", backend, reason)
