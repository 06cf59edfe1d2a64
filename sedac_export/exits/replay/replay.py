"""Run a bundle's engines over whole texts, many positions in a pass, with exits.

With kv_fill propagate a token that has exited after d layers keeps its hidden state h_d as input
and output of every deeper layer, which still compute their keys and values from h_d. With defer it
goes on for its keys and values, and only its prediction is of h_d. Either way one pass over many
positions gives what decoding them one by one with exits gives.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sedac_export.arrays import Floats
from sedac_export.bundle import Bundle
from sedac_export.bundle.manifest import LayerEngineEntry, Manifest
from sedac_export.bundle.runner import BundleRunner, PassInputs
from sedac_export.bundle.sessions import THREADS
from sedac_export.errors import SedacError
from sedac_export.exits.replay.pass_exits import PassExits
from sedac_export.exits.replay.probes_file import check_probes
from sedac_export.exits.replay.signals import Signals
from sedac_runtime._core import PolicySettings, stabilities
from sedac_runtime.choices import KvFill

CHUNK = 256

# hidden states [n, hidden] after a layer, and what is known of the tokens there
Watch = Callable[[Floats, Signals], None]


@dataclass
class Trace:
    """What n positions gave.

    depths: layers run, int64 [n]; for a soft exit, layers run whole. exits: the depth of the
    decision, int64 [n]. tokens: argmax, int64 [n]. entropies (nats), margins (of probabilities)
    and losses (negative log-likelihood of the text's next token, NaN at its end) of the full
    head: fp32 [n].
    """

    depths: npt.NDArray[np.int64]
    exits: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    entropies: Floats
    margins: Floats
    losses: Floats

    @classmethod
    def join(cls, traces: list["Trace"]) -> "Trace":
        """The traces one after the other."""
        columns = zip(*(vars(trace).values() for trace in traces), strict=True)
        return cls(*map(np.concatenate, columns))


class Replay:
    """A bundle's engines, loaded for passes over texts.

    Raises SedacError for bundles whose engines hold several layers, since exits are replayed layer
    by layer, and for probes of another model.
    """

    def __init__(self, bundle: Bundle, threads: int = THREADS) -> None:
        manifest = bundle.manifest
        require_single_layers(manifest, bundle.directory)
        check_probes(bundle)
        self.bundle, self.manifest = bundle, manifest
        self.runner = BundleRunner.of(bundle, threads)
        self.num_layers = manifest.model.num_layers
        self.exits = [entry.depth for entry in manifest.engines.exits]
        self.early = set(early_depths(manifest))

    @property
    def attention(self) -> list[LayerEngineEntry]:
        """The attention-only engines, which soft exits need. Raises SedacError without them."""
        entries = self.manifest.engines.attention
        if not entries:
            raise SedacError(
                "the bundle has no attention engines, which soft exits need; build it again"
            )
        return entries

    def run(
        self,
        tokens: npt.NDArray[np.int64],
        policy: PolicySettings | None = None,
        watch: Watch | None = None,
        full_depth: int = 1,
        kv_fill: KvFill = "propagate",
    ) -> Trace:
        """Run one text, int64 [n], n up to the cache length.

        policy decides about all but the first `full_depth` positions; None exits nowhere. watch
        gets the hidden states [chunk, hidden] and signals of every chunk after every layer, and
        at depth 0.

        Raises SedacError when an activation is NaN or infinite.
        """
        sequence = _Sequence(self, tokens, kv_fill)
        return Trace.join(
            [
                sequence.chunk(chunk, policy, watch, max(0, full_depth - chunk.start))
                for chunk in chunks(len(tokens))
            ]
        )

    def exit_signals(self, depth: int, x: Floats, stabilities: Floats) -> Floats:
        """margin, entropy and learned, fp32 [n, 3], of hidden states [n, hidden].

        stabilities: fp32 [n, 3], of the depths up to `depth`. Raises SedacError where the bundle
        has no exit engine.
        """
        signals: Floats = self.runner.exit_signals(depth, x[None], stabilities[None])[0]
        return signals

    def logits(self, depth: int, x: Floats) -> Floats:
        """The head on hidden states [n, hidden] after `depth` layers, through the lens if any."""
        return self.plain_logits(self.runner.lens(depth, x[None])[0])

    def plain_logits(self, x: Floats) -> Floats:
        """The head on hidden states [n, hidden]: fp32 [n, vocabulary]."""
        logits: Floats = self.runner.head(x[None])[0]
        return logits


def chunks(tokens: int, size: int = CHUNK) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `tokens`."""
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


class _Sequence:
    """One text and its caches."""

    def __init__(self, replay: Replay, tokens: npt.NDArray[np.int64], kv_fill: KvFill) -> None:
        self.replay, self.tokens, self.kv_fill = replay, tokens, kv_fill
        self.caches = [
            replay.runner.empty_caches(layer, 1, len(tokens)) for layer in range(replay.num_layers)
        ]

    def chunk(
        self, chunk: slice, policy: PolicySettings | None, watch: Watch | None, full_depth: int
    ) -> Trace:
        tokens = self.tokens[chunk]
        replay = self.replay
        full = np.arange(len(tokens)) < full_depth
        exits = PassExits(policy, replay.num_layers, replay.early, full)
        inputs = replay.runner.begin(chunk)
        x = replay.runner.embed(tokens, inputs)[0]
        if watch:
            watch(x, self._signals(0, x, {}, exits))
        predicting = np.zeros_like(x)
        for layer in range(replay.num_layers):
            outputs = self._layer(layer, x, inputs, exits)
            x = outputs["y"][0]
            exits.stabilities[:, layer] = outputs["stability"][0, :, 0]
            signals = self._signals(layer + 1, x, outputs, exits)
            if watch:
                watch(x, signals)
            leaving = exits.observe(signals)
            predicting[leaving] = x[leaving]
        _check_finite(x, chunk)
        x = np.where(exits.exited[:, None], predicting, x)
        return self._finish(x, exits, self.tokens[chunk.start + 1 : chunk.stop + 1])

    def _layer(self, layer: int, x: Floats, inputs: PassInputs, exits: PassExits) -> dict[str, Any]:
        """The layer's outputs, those of exited tokens unchanged, of soft exits without its MLP."""
        runner, caches = self.replay.runner, self.caches[layer]
        entry = self.replay.manifest.engines.layers[layer]
        outputs = runner.layers(entry, x[None], inputs, caches)
        # by the runtime's own sums: the engine's round otherwise, and a threshold may lie between
        outputs["stability"][0, :, 0] = stabilities(x, outputs["y"][0])
        skipping = exits.skip_from <= layer
        if skipping.any():
            # keys and values come before the MLP, so both engines write the same ones
            other = runner.layers(self.replay.attention[layer], x[None], inputs, caches)
            outputs["y"][0, skipping] = other["y"][0, skipping]
        if self.kv_fill == "propagate":
            outputs["y"][0, exits.exited] = x[exits.exited]
        return outputs

    def _signals(self, depth: int, x: Floats, outputs: dict[str, Any], exits: PassExits) -> Signals:
        """What the layer's `outputs` say; at depth 0, before the first layer, nothing."""
        last = exits.last_stabilities(depth)
        return Signals(
            depth,
            exits.stabilities[:, depth - 1] if depth else np.ones(len(x), dtype=np.float32),
            outputs["risk"][0, :, 0] if "risk" in outputs else None,
            lambda: self.replay.exit_signals(depth, x, last),
        )

    def _finish(self, x: Floats, exits: PassExits, following: npt.NDArray[np.int64]) -> Trace:
        logits = np.empty((len(x), self.replay.manifest.model.vocab_size), dtype=np.float32)
        heads = exits.head_depths()
        for depth in np.unique(heads):
            logits[heads == depth] = self.replay.logits(int(depth), x[heads == depth])
        top, entropies, margins, losses = statistics(logits, following)
        return Trace(exits.depths(), exits.exits, top, entropies, margins, losses)


def statistics(
    logits: Floats, following: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], Floats, Floats, Floats]:
    """argmax, entropy (nats), margin and loss of logits [n, vocabulary].

    following: the text's next tokens; one fewer than logits at the text's end.
    """
    top = logits.argmax(-1)
    shifted = logits - logits.max(-1, keepdims=True)
    exponentials = np.exp(shifted)
    sums = exponentials.sum(-1)
    log_sums = np.log(sums)
    entropies = log_sums - (exponentials * shifted).sum(-1) / sums
    two = np.partition(exponentials, -2, axis=-1)[:, -2:] / sums[:, None]
    losses = np.full(len(logits), math.nan, dtype=np.float32)
    known = np.arange(len(following))
    losses[known] = log_sums[known] - shifted[known, following]
    return top, entropies, two[:, 1] - two[:, 0], losses


def _check_finite(x: Floats, chunk: slice) -> None:
    if not np.isfinite(x).all():
        raise SedacError(
            f"activations are NaN or infinite at positions {chunk.start} to {chunk.stop - 1};"
            " is the model damaged? sedac-export inspect shows what its bundle was validated at"
        )


def early_depths(manifest: Manifest) -> list[int]:
    """The depths at which tokens may exit, full depth aside."""
    return [depth for depth in manifest.exit_layers if depth < manifest.model.num_layers]


def require_single_layers(manifest: Manifest, name: Path) -> None:
    """Raise SedacError where engines of the bundle `name` have several layers."""
    if manifest.layers_per_engine != 1:
        raise SedacError(
            f"{name} has {manifest.layers_per_engine} layers in an engine; exits are replayed layer"
            " by layer, build with --layers-per-engine 1"
        )


def require_early_depths(manifest: Manifest, name: Path) -> None:
    """Raise SedacError where no token of the bundle `name` can exit early, or exits cannot be
    replayed."""
    require_single_layers(manifest, name)
    if not early_depths(manifest):
        raise SedacError(
            f"{name} has no exit before its last layer, so that no token exits early; build it with"
            " other --exit-layers"
        )
