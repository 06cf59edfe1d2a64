"""SedacModel: a loaded bundle, used as transformers' models are."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from sedac_runtime import _core
from sedac_runtime.chat import Message, render_chat
from sedac_runtime.flavour import Executor, Target
from sedac_runtime.library import default_threads, find_onnxruntime
from sedac_runtime.policy import PolicyName, choose_policy
from sedac_runtime.ranges import LARGEST_SEED, MOST_THREADS, check_count

Mode = Literal["full", "exit", "lossless"]
Drafter = Literal["none", "auto", "early-exit", "prompt-lookup"]
KvFill = Literal["propagate", "defer"]
Verify = Literal["always", "changed"]
Backend = Literal["onnxruntime"] | Target
BACKENDS: tuple[Backend, ...] = ("onnxruntime", *get_args(Target))


@dataclass(frozen=True)
class TokenOutput:
    """One generated token: its id, the text it completes, the layers executed, and why no more."""

    id: int
    text: str
    exit_layer: int
    exit_reason: str


@dataclass(frozen=True)
class GenerationOutput:
    """A finished generation. Field by field the object that `generate --json` prints.

    With a drafter: `drafted` tokens were guessed, `accepted` of them confirmed in `verify_passes`
    passes; draft_depths counts the drafts by the layers they went through, 0 for those of prompt
    lookup. All are 0 without one. In mode "exit" a draft may hold tokens that exited; they count
    too. certificate is the bundle's where it is about how these tokens were generated, else None;
    certification says in one sentence what is certified of them, None where all are full depth's.
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
    """Iterates over TokenOutputs as they are generated; then `output` is the whole.

    The model is busy from the first token asked for to the last. `close`, the end of a `with` block
    over the stream, leaving the loop over it and dropping it free the model at once. A stream that
    is kept but not read stays a few tokens ahead of its reader; another generation that wants the
    model lets it run to its end first. Threads that read one stream take turns.
    """

    def __init__(
        self,
        generation: _core.Generation,
        mode: Mode,
        kv_fill: KvFill,
        drafter: Drafter,
        prompt_tokens: int,
        num_layers: int,
    ) -> None:
        self._generation = generation
        self._mode: Mode = mode
        self._kv_fill: KvFill = kv_fill
        self._drafter: Drafter = drafter
        self._prompt_tokens = prompt_tokens
        self._num_layers = num_layers

    def __iter__(self) -> Iterator[TokenOutput]:
        try:
            for token in self._generation:
                yield TokenOutput(*token)
        finally:
            self.close()

    def __enter__(self) -> "GenerationStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the generation where it is. After one that is over this does nothing."""
        self._generation.close()

    @cached_property
    def output(self) -> GenerationOutput:
        """The finished generation; runs to the end if the stream was not iterated over.

        Raises RuntimeError when it was closed before.
        """
        for _ in self:
            pass
        return self._collect()

    @property
    def rest(self) -> str:
        """Text that no token completed, such as an unfinished character at the end."""
        _ = self.output
        rest: str = self._generation.summary()["rest"]
        return rest

    @property
    def profile(self) -> str | None:
        """A Chrome trace of every step and engine run, as JSON; None unless it was asked for."""
        _ = self.output
        profile: str | None = self._generation.summary()["profile"]
        return profile

    def _collect(self) -> GenerationOutput:
        summary = self._generation.summary()
        tokens = [TokenOutput(*token) for token in summary["tokens"]]
        layers = [token.exit_layer for token in tokens]
        decoded = len(layers) - 1
        certificate, certification = self._generation.certification or (None, None)
        return GenerationOutput(
            text="".join(token.text for token in tokens) + summary["rest"],
            tokens=[token.id for token in tokens],
            exit_layers=layers,
            num_layers=self._num_layers,
            mean_exit_layer=sum(layers) / len(layers),
            exit_reasons=[token.exit_reason for token in tokens],
            mode=self._mode,
            kv_fill=self._kv_fill,
            drafter=self._drafter,
            prompt_tokens=self._prompt_tokens,
            prefill_ms=summary["prefill_ms"],
            decode_ms=summary["decode_ms"],
            decode_tokens_per_second=decoded / summary["decode_ms"] * 1e3 if decoded else 0.0,
            finish_reason=summary["finish_reason"],
            drafted=summary["drafted"],
            accepted=summary["accepted"],
            verify_passes=summary["verify_passes"],
            draft_depths=summary["draft_depths"],
            certificate=None if certificate is None else json.loads(certificate),
            certification=certification,
        )


class SedacModel:
    """A bundle with its engines loaded. One sequence is generated at a time."""

    def __init__(self, bundle: Path, core: _core.Model) -> None:
        self.bundle = bundle
        self._core = core

    @classmethod
    def from_pretrained(
        cls,
        bundle: str | Path,
        *,
        threads: int | None = None,
        backend: Backend = "onnxruntime",
        verify: Verify = "always",
        memory_limit: int | None = None,
    ) -> "SedacModel":
        """Check and load the bundle in directory `bundle`.

        threads is fixed for the process by the first bundle loaded; None takes all processors.
        verify "changed" leaves out the digests of files that have the size, times and inode that
        they had when they were last found whole. memory_limit is the bytes that engines and caches
        may take; None means the memory that is free.
        backend "onnxruntime" runs the engines on the CPU, "tensorrt" and "tensorrt-rtx" the
        bundle's plans of that target on the first NVIDIA GPU.
        Raises BundleError when the bundle is damaged or needs more memory, EngineError when ONNX
        Runtime or TensorRT fails.
        """
        count = default_threads() if threads is None else threads
        check_count("threads", count, 1, MOST_THREADS)
        if memory_limit is not None:
            check_count("memory_limit", memory_limit, 1, LARGEST_SEED)
        path = Path(bundle)
        core = _core.Model(
            path,
            find_onnxruntime(),
            count,
            _plans(backend, path),
            verify=verify,
            memory_limit=memory_limit,
        )
        return cls(path, core)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return self._core.num_layers

    @property
    def tolerance(self) -> float:
        """The largest difference from the original model that the build allowed; see
        `sedac_runtime.tolerance`."""
        return self._core.tolerance

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a text."""
        return self._core.eos_token_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` with the special tokens that the model expects around a text.

        Raises InputError when the bundle has no tokenizer.
        """
        return self._core.encode(text)

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """Token ids of a chat, rendered by the bundle's template.

        Raises InputError when the bundle has no tokenizer or no template for these messages.
        """
        return self._core.encode(
            render_chat(self.bundle, self._core.read_text, messages), add_special_tokens=False
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special tokens left out.

        Raises InputError when the bundle has no tokenizer.
        """
        return self._core.decode(list(tokens))

    def generate(self, prompt: str | Sequence[int], **settings: object) -> GenerationOutput:
        """Generate to the end. Takes what `stream` takes."""
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
        """Generate token by token after `prompt`, a text or token ids, as the stream is read.

        mode "full" runs every layer. "exit" stops a token where `policy` says so: "stability" once
        `consecutive_k` layers in a row had a stability of at least `tau`, from `min_layer_ratio` of
        the layers on; "probe" and "cascade" by the entropy probes' risk, "margin" and "learned" by
        the exit engines, at the bundle's thresholds or at `threshold` for all depths. "lossless"
        gives full depth's tokens faster: `drafter` guesses tokens, by exiting early ("early-exit"),
        from the text so far ("prompt-lookup") or both ("auto", the default), and full depth
        verifies several in one pass. In mode "exit" a drafter other than "none" guesses the tokens
        that the policy does not let exit; while guesses wait, deeper exits are left to full depth.
        What is None comes from the bundle's sedac_config.json. The caches of skipped layers get
        what the layers compute: with kv_fill "propagate" from the hidden state at the exit, with
        "defer", which drafters need, in full, with the next token that goes deeper. forced_exit
        exits at the first exit from the given depths on, taken in turn, whatever the policy says.
        temperature 0 is greedy. A text ends with one of `stop_tokens` (None means the model's
        end-of-text tokens) or with the token that completes one of `stop_strings`. With `profile`
        the stream's `profile` is a Chrome trace of what ran.

        Raises InputError when a setting is out of range or the prompt does not fit, at the latest
        when the first token is asked for.
        """
        for name, value, known in (
            ("mode", mode, Mode),
            ("kv_fill", kv_fill, KvFill),
            ("drafter", drafter, Drafter),
        ):
            if value is not None and value not in get_args(known):
                choices = " or ".join(get_args(known))
                raise _core.InputError(f"{name} {value} is out of range: {choices}")
        if mode != "exit":
            _refuse_policy(mode, policy, threshold, tau, consecutive_k, min_layer_ratio)
        tokens = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        stops = self.eos_token_ids if stop_tokens is None else list(stop_tokens)
        settings, fill = self._exits(
            policy, threshold, tau, consecutive_k, min_layer_ratio, kv_fill
        )
        waits = fill == "defer" and settings.get("exit_kind") != "soft"
        drafts = self._drafter(mode if forced_exit is None else "full", drafter, waits)
        for token in (*tokens, *stops):
            check_count("token", token, 0)
        for depth in forced_exit or ():
            check_count("forced_exit", depth, 1)
        check_count("max_new_tokens", max_new_tokens, 1)
        check_count("top_k", top_k, 0)
        check_count("seed", seed, 0, LARGEST_SEED)
        generation = self._core.generate(
            tokens,
            max_new_tokens=max_new_tokens,
            stop_tokens=stops,
            stop_strings=list(stop_strings),
            policy=json.dumps(settings) if mode == "exit" else None,
            forced_exit=None if forced_exit is None else list(forced_exit),
            drafter=None if drafts == "none" else drafts,
            kv_fill=fill,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            profile=profile,
        )
        if forced_exit is not None:
            mode = "exit"
        return GenerationStream(generation, mode, fill, drafts, len(tokens), self.num_layers)

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
        """Run a given text token by token with exits: what `generate` does, on known tokens.

        Returns, for each token but the first, the likeliest next token and the layers executed.
        The settings are those of `stream`; so are the errors.
        """
        tokens = self.encode(text) if isinstance(text, str) else list(text)
        settings, fill = self._exits(
            policy, threshold, tau, consecutive_k, min_layer_ratio, kv_fill
        )
        for token in tokens:
            check_count("token", token, 0)
        return self._core.follow(tokens, policy=json.dumps(settings), kv_fill=fill)

    def measure(
        self,
        cases: list[tuple[str, bool, int | None, str | None]],
        prompt: list[int] | tuple[str, int],
        new_tokens: int,
        repeat: int,
        against: int,
    ) -> list[dict[str, Any]]:
        """What `sedac_runtime.bench` measures, case by case.

        Each case is a row's name, whether the monolith runs it, the depth to exit at and the
        drafter, each None without; `against` is the index of the one to compare with. prompt: token
        ids, or a text and how many of its tokens. Raises InputError.
        """
        return self._core.bench(cases, prompt, new_tokens, repeat, against)

    def _drafter(self, mode: Mode, drafter: Drafter | None, waits: bool) -> Drafter:
        """What guesses tokens in `mode`: `drafter`, or where that is None the default.

        waits: whether tokens that exit wait to be continued, without which the bundle's drafter
        cannot draft between them.
        """
        if mode == "full":
            return "none"
        if mode == "exit":
            own = self._core.exit_config[2] if waits else None
            return drafter or own or "none"
        if drafter == "none":
            raise _core.InputError("drafter none is out of range: mode lossless needs one")
        return drafter or "auto"

    def _exits(
        self,
        policy: PolicyName | None,
        threshold: float | None,
        tau: float | None,
        consecutive_k: int | None,
        min_layer_ratio: float | None,
        kv_fill: KvFill | None,
    ) -> tuple[dict[str, Any], KvFill]:
        """The policy's settings and the KV fill."""
        if consecutive_k is not None:
            check_count("consecutive_k", consecutive_k, 1, self.num_layers)
        policy_json, bundle_fill, _ = self._core.exit_config
        own = json.loads(policy_json)
        stability = {
            "tau": tau,
            "consecutive_k": consecutive_k,
            "min_layer_ratio": min_layer_ratio,
        }
        settings = choose_policy(own, policy, threshold, stability, self._core.trained_depths)
        return settings, bundle_fill if kv_fill is None else kv_fill


def _refuse_policy(
    mode: Mode,
    policy: PolicyName | None,
    threshold: float | None,
    tau: float | None,
    consecutive_k: int | None,
    min_layer_ratio: float | None,
) -> None:
    """Raise InputError for an exit policy in a mode that takes no exits: it would do nothing."""
    exits = {
        "policy": policy,
        "threshold": threshold,
        "tau": tau,
        "consecutive_k": consecutive_k,
        "min_layer_ratio": min_layer_ratio,
    }
    for name, value in exits.items():
        if value is not None:
            raise _core.InputError(f"{name} belongs to mode exit, not to {mode}; set mode exit")


def _plans(backend: Backend, bundle: Path) -> tuple[str, Executor, bool] | None:
    """What runs the bundle's plans in the core; None where ONNX Runtime runs its graphs."""
    if backend not in BACKENDS:
        raise _core.InputError(f"backend {backend} is out of range: {' or '.join(BACKENDS)}")
    if backend == "onnxruntime":
        return None
    from sedac_runtime.tensorrt import PlanExecutor

    return backend, PlanExecutor(backend, bundle), False
