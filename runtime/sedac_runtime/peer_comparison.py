"""SEDAC beside other runtimes on the same model: speed, agreement, memory and loading."""

import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

from sedac_runtime._core import EngineError, InputError
from sedac_runtime.choices import LosslessDrafter, Verify
from sedac_runtime.library import default_threads
from sedac_runtime.peer_models import (
    PeerName,
    check_asked_for,
    find_models,
    genai_model,
    installed_peers,
    last_line,
)
from sedac_runtime.ranges import MOST_THREADS, check_count, token_ids

# a prompt and the tokens after it
Continuation = tuple[list[int], list[int]]


class PeerRow(TypedDict):
    """The figures of one runtime; `sedac_runtime.bench_peers` describes the fields."""

    name: str
    version: str
    prefill_ms: float
    tokens_per_second: float
    min_tokens_per_second: float
    max_tokens_per_second: float
    speedup: dict[str, float]
    prefill_speedup: dict[str, float]
    agreement: float
    original_agreement: float | None
    load_ms: float
    resident_bytes: int


def bench_peers(
    bundle: str | Path,
    peers: Sequence[PeerName],
    *,
    peer_models: Mapping[PeerName, str] | None = None,
    forced_exit: Sequence[int] = (),
    drafters: Sequence[LosslessDrafter] = (),
    prompts: Sequence[str | Sequence[int]] = (),
    prompt_tokens: int = 64,
    new_tokens: int = 128,
    repeat: int = 5,
    threads: int | None = None,
    verify: Verify = "always",
    memory_limit: int | None = None,
) -> list[PeerRow]:
    """Measure SEDAC and other runtimes on the CPU; returns a row for each.

    Rows are "chain" (full depth), "exit@d" and "lossless:d" as in `bench`, then those of `peers`
    that are installed; a warning names the others. In each of `repeat` rounds every row has a new
    process, in random order, which loads the model, warms up, and continues each prompt greedily by
    `new_tokens`. prompts: texts, cut to `prompt_tokens` tokens, or token ids; by default arbitrary
    tokens, which say nothing about drafts or exits.

    peer_models: where a peer has the model from. For onnxruntime-genai and transformers that is a
    checkpoint's directory or a hub id, by default the bundle's; for llama.cpp a GGUF file. What is
    given for a peer that is not installed is not used.
    onnxruntime-genai's model builder makes a model of the bundle's precision and block size, unless
    the directory is one that it wrote.

    Figures are medians over the rounds. prefill_ms: time to the first token, the mean over the
    prompts; tokens_per_second: of the tokens after it. speedup and prefill_speedup: by peer, how
    many times as fast as that peer, the ratio taken within each round. agreement: the share of the
    tokens that the chain would have chosen after the same text; original_agreement: the share that
    transformers would have chosen, None where it is not a peer. load_ms: from importing the library
    to a first token. resident_bytes: of the process after the last token, mapped files included.

    Raises InputError when a setting is out of range or a model is missing, EngineError when a
    runtime fails.
    """
    check_count("prompt_tokens", prompt_tokens, 1)
    check_count("new_tokens", new_tokens, 2)
    check_count("repeat", repeat, 1)
    threads = default_threads() if threads is None else threads
    check_count("threads", threads, 1, MOST_THREADS)
    directory = Path(bundle)
    given = peer_models or {}
    check_asked_for(peers, given)
    compared = installed_peers(peers)
    models = find_models(directory, compared, given)
    options = {"verify": verify, "memory_limit": memory_limit}
    sedac = _Case("", "sedac", str(directory), threads, options)
    texts = prompts or [[1 + position % 97 for position in range(prompt_tokens)]]
    tokens = _encode(sedac, texts, prompt_tokens)
    with tempfile.TemporaryDirectory() as scratch:
        if "onnxruntime-genai" in compared:
            name: PeerName = "onnxruntime-genai"
            models[name] = genai_model(directory, models[name], Path(scratch))
        cases = [
            *(
                _Case(row, "sedac", str(directory), threads, options, settings)
                for row, settings in _settings(forced_exit, drafters).items()
            ),
            *(_Case(peer, peer, models[peer], threads) for peer in compared),
        ]
        rounds = _measure(cases, tokens, new_tokens, repeat)
    judges = [sedac, *(case for case in cases if case.runtime == "transformers")]
    agreements = [_judge(judge, tokens, rounds) for judge in judges]
    return [_row(case.name, rounds, compared, agreements) for case in cases]


@dataclass(frozen=True)
class _Case:
    """A row: what its processes are told. The fields are those of `peer_process`'s requests."""

    name: str
    runtime: str
    model: str
    threads: int
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def ask(self, capacity: int, **request: Any) -> dict[str, Any]:
        """What a new process answers. Raises EngineError when it fails."""
        run = subprocess.run(
            [sys.executable, "-P", "-m", "sedac_runtime.peer_process"],
            input=json.dumps(vars(self) | {"capacity": capacity} | request),
            capture_output=True,
            text=True,
        )
        if run.returncode:
            reason = last_line(run.stderr)
            if run.returncode < 0:
                reason = f"ended by {signal.Signals(-run.returncode).name}"
            raise EngineError(f"{self.runtime} fails with {self.model}: {reason}")
        answer: dict[str, Any] = json.loads(run.stdout)
        return answer


@dataclass(frozen=True)
class _Round:
    """What one row gave in one round."""

    version: str
    prefill_s: float
    speed: float
    load_s: float
    resident_bytes: int
    tokens: list[list[int]]

    @classmethod
    def of(cls, answer: dict[str, Any]) -> "_Round":
        generations = answer["generations"]
        decoded = sum(len(one["tokens"]) - 1 for one in generations)
        return cls(
            answer["version"],
            statistics.mean(one["prefill_s"] for one in generations),
            decoded / sum(one["decode_s"] for one in generations),
            answer["load_s"],
            answer["resident_bytes"],
            [one["tokens"] for one in generations],
        )


_Rounds = dict[str, list[_Round]]


def _settings(
    forced_exit: Sequence[int], drafters: Sequence[LosslessDrafter]
) -> dict[str, dict[str, Any]]:
    """SEDAC's rows, with what `SedacModel.stream` is given."""
    rows: dict[str, dict[str, Any]] = {"chain": {"mode": "full"}}
    rows |= {f"exit@{depth}": {"mode": "exit", "forced_exit": [depth]} for depth in forced_exit}
    rows |= {f"lossless:{name}": {"mode": "lossless", "drafter": name} for name in drafters}
    return rows


def _encode(
    sedac: _Case, prompts: Sequence[str | Sequence[int]], prompt_tokens: int
) -> list[list[int]]:
    """Token ids of `prompts`; of texts the first `prompt_tokens`."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(sedac.ask(0, texts=texts)["tokens"] if texts else ())
    found = []
    for prompt in prompts:
        tokens = next(encoded)[:prompt_tokens] if isinstance(prompt, str) else token_ids(prompt)
        if isinstance(prompt, str) and len(tokens) < prompt_tokens:
            raise InputError(
                f"prompt_tokens {prompt_tokens} is out of range: at most the {len(tokens)} tokens"
                " of the text"
            )
        found.append(tokens)
    return found


def _measure(cases: list[_Case], prompts: list[list[int]], new_tokens: int, repeat: int) -> _Rounds:
    order = random.Random(0)
    capacity = max(map(len, prompts)) + new_tokens
    rounds: _Rounds = {case.name: [] for case in cases}
    for _ in range(repeat):
        for case in order.sample(cases, len(cases)):
            answer = case.ask(capacity, prompts=prompts, new_tokens=new_tokens)
            rounds[case.name].append(_Round.of(answer))
    return rounds


def _judge(judge: _Case, prompts: list[list[int]], rounds: _Rounds) -> dict[str, float]:
    """By row, the share of its last round's tokens that `judge` would have chosen."""
    texts = {
        name: list(zip(prompts, given[-1].tokens, strict=True)) for name, given in rounds.items()
    }
    different: list[Continuation] = []
    for text in chain.from_iterable(texts.values()):
        if text not in different:
            different.append(text)
    capacity = max(len(prompt) + len(tokens) for prompt, tokens in different)
    shares = judge.ask(capacity, continuations=different)["agreement"]
    return {
        name: statistics.mean(shares[different.index(text)] for text in own)
        for name, own in texts.items()
    }


def _row(
    name: str, rounds: _Rounds, peers: Sequence[str], agreements: list[dict[str, float]]
) -> PeerRow:
    mine = rounds[name]
    speeds = [one.speed for one in mine]
    ours, *original = agreements
    return PeerRow(
        name=name,
        version=mine[0].version,
        prefill_ms=1e3 * statistics.median(one.prefill_s for one in mine),
        tokens_per_second=statistics.median(speeds),
        min_tokens_per_second=min(speeds),
        max_tokens_per_second=max(speeds),
        speedup={
            peer: statistics.median(
                one.speed / other.speed for one, other in zip(mine, rounds[peer], strict=True)
            )
            for peer in peers
        },
        prefill_speedup={
            peer: statistics.median(
                other.prefill_s / one.prefill_s
                for one, other in zip(mine, rounds[peer], strict=True)
            )
            for peer in peers
        },
        agreement=ours[name],
        original_agreement=original[0][name] if original else None,
        load_ms=1e3 * statistics.median(one.load_s for one in mine),
        resident_bytes=int(statistics.median(one.resident_bytes for one in mine)),
    )
