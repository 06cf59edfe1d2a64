"""What quantization costs: the engines as they run beside the model before it was quantized."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sedac_export.arrays import Array, Floats
from sedac_export.build.texts import Texts
from sedac_export.bundle.manifest import LayerEngineEntry, Manifest
from sedac_export.bundle.runner import BundleRunner, PassInputs
from sedac_export.console import StageProgress
from sedac_export.model.reference import Reference, opened_reference
from sedac_export.model.skeleton import Skeleton

# positions whose logits are compared at once
_ROWS = 64


@dataclass
class QualityRow:
    """How far an engine's output is from the original's, both from the original's input.

    difference: mean over the positions of the L2 norm of the difference over the original's.
    """

    engine: str
    difference: float = 0.0
    positions: int = 0

    def add(self, got: Array, expected: Array) -> None:
        """Count positions [1, tokens, n] in."""
        norms = np.linalg.norm(expected, axis=-1)
        relative = np.linalg.norm(got - expected, axis=-1) / np.maximum(norms, 1e-30)
        self.positions += relative.size
        self.difference += (float(relative.mean()) - self.difference) * (
            relative.size / self.positions
        )


@dataclass
class Quality:
    """The quantized model beside the original, each position predicted from the true text.

    agreement: share of positions at which both choose the same token; divergence: mean
    Kullback-Leibler divergence of the quantized model's distribution from the original's, in nats.
    """

    text: str
    tokens: int
    original_perplexity: float = 0.0
    perplexity: float = 0.0
    agreement: float = 0.0
    divergence: float = 0.0
    engines: list[QualityRow] = field(default_factory=list)


@torch.no_grad()
def measure_quality(
    skeleton: Skeleton,
    directory: Path,
    manifest: Manifest,
    texts: Texts,
    progress: StageProgress,
) -> Quality:
    """Run the bundle in `directory` and the original over the texts' windows for evaluation."""
    comparison = _Comparison(BundleRunner.as_shipped(directory, manifest))
    progress("compare", 0, len(texts.evaluation))
    with opened_reference(skeleton, lambda _, weight: weight) as reference:
        for index, window in enumerate(texts.evaluation):
            comparison.add(reference, window)
            progress("compare", index + 1, len(texts.evaluation))
    return comparison.finish(texts)


@dataclass
class _Comparison:
    runner: BundleRunner
    rows: dict[str, QualityRow] = field(default_factory=dict)
    tokens: Array = field(init=False)
    inputs: PassInputs = field(init=False)
    hidden: list[Array] = field(default_factory=list)
    chained: Array = field(init=False)
    losses: list[Floats] = field(default_factory=list)
    original_losses: list[Floats] = field(default_factory=list)
    divergences: list[Floats] = field(default_factory=list)
    matches: list[Array] = field(default_factory=list)

    def add(self, reference: Reference, window: Array) -> None:
        """Compare over one window."""
        self.tokens, self.hidden = window, []
        logits = reference(torch.from_numpy(window)[None], len(window), self.observe)
        self._compare_logits(logits.numpy())

    def observe(self, depth: int, hidden: torch.Tensor) -> None:
        """Take the original's residual stream after `depth` layers; run the engine there."""
        self.hidden.append(hidden.numpy())
        if depth == 0:
            self.inputs = self.runner.begin(slice(0, len(self.tokens)))
            self.chained = self.runner.embed(self.tokens, self.inputs)
            self._count("embed", self.chained, self.hidden[0])
            return
        engines = self.runner.manifest.engines.layers
        entry = next((e for e in engines if e.first_layer + e.num_layers == depth), None)
        if entry is not None:
            self._count(Path(entry.file).stem, self._layer(entry, self.hidden[0]), self.hidden[-1])
            self.chained = self._layer(entry, self.chained)
            del self.hidden[:-1]

    def finish(self, texts: Texts) -> Quality:
        """The figures over all windows."""
        return Quality(
            texts.name,
            texts.tokens(),
            original_perplexity=float(np.exp(np.concatenate(self.original_losses).mean())),
            perplexity=float(np.exp(np.concatenate(self.losses).mean())),
            agreement=float(np.concatenate(self.matches).mean()),
            divergence=float(np.concatenate(self.divergences).mean()),
            engines=list(self.rows.values()),
        )

    def _layer(self, entry: LayerEngineEntry, x: Array) -> Array:
        caches = self.runner.empty_caches(entry.first_layer, entry.num_layers, len(self.tokens))
        return self.runner.layers(entry, x, self.inputs, caches)["y"]

    def _count(self, engine: str, got: Array, expected: Array) -> None:
        self.rows.setdefault(engine, QualityRow(engine)).add(got, expected)

    def _compare_logits(self, logits: Array) -> None:
        """Of all positions; the newest predicts nothing that is known."""
        for rows in _slices(len(self.tokens)):
            expected = logits[:, rows]
            self._count("head", self.runner.head(self.hidden[-1][:, rows]), expected)
            original = _log_softmax(expected[0])
            quantized = _log_softmax(self.runner.head(self.chained[:, rows])[0])
            self.matches.append(original.argmax(-1) == quantized.argmax(-1))
            self.divergences.append((np.exp(original) * (original - quantized)).sum(-1))
            next_tokens = self.tokens[rows.start + 1 : rows.stop + 1, None]
            for found, losses in ((original, self.original_losses), (quantized, self.losses)):
                known = found[: len(next_tokens)]
                losses.append(-np.take_along_axis(known, next_tokens, -1).ravel())


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS))


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
