"""Compare every engine of a bundle, and the whole chain, with the original model."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sedac_export.arrays import Array
from sedac_export.build.quality import Quality
from sedac_export.bundle.manifest import LayerEngineEntry, Manifest
from sedac_export.bundle.runner import BundleRunner, PassInputs
from sedac_export.bundle.sessions import Caches
from sedac_export.errors import SedacError
from sedac_export.model.reference import Rounding, opened_reference
from sedac_export.model.skeleton import Skeleton
from sedac_export.model.support import boundaries

# a prefill of at least this many tokens, and of as many beyond every boundary that the model
# declares; then a chunk on top of a filled cache, and a token alone
_PREFILL, _BEYOND = 256, 16
_REST = (7, 1)


@dataclass
class ValidationRow:
    """How far one engine is from the original, over all chunks.

    error is the largest absolute difference divided by the larger of 1 and the largest reference
    value; agreement is the share of positions with the same argmax (of logits or hidden state).
    """

    engine: str
    error: float = 0.0
    cosine: float = 1.0
    agreement: float = 1.0
    errors: dict[int, float] = field(default_factory=dict)

    def add(self, tokens: int, got: Array, expected: Array) -> None:
        """Count one chunk's output [1, tokens, n] in."""
        scale = max(1.0, float(np.abs(expected).max()))
        error = float(np.abs(got - expected).max()) / scale
        error = error if np.isfinite(error) else float("inf")
        self.errors[tokens] = max(error, self.errors.get(tokens, 0.0))
        self.error = max(self.error, error)
        norms = np.linalg.norm(got, axis=-1) * np.linalg.norm(expected, axis=-1)
        cosine = (got * expected).sum(-1) / np.maximum(norms, 1e-30)
        self.cosine = min(self.cosine, float(cosine.min()))
        same = (got.argmax(-1) == expected.argmax(-1)).mean()
        self.agreement = min(self.agreement, float(same))


@dataclass(frozen=True)
class BundleValidation:
    """Per-engine rows on the original's own hidden states, and the chain end to end.

    The original's weights are rounded as the bundle's are; quality is what the rounding itself
    costs, measured for quantized weights where there is a tokenizer.
    """

    tolerance: float
    engines: list[ValidationRow]
    end_to_end: ValidationRow
    quality: Quality | None = None

    def worst(self) -> ValidationRow:
        """The row furthest over the tolerance, or nearest to it."""
        return max([*self.engines, self.end_to_end], key=lambda row: row.error)

    def check(self) -> None:
        """Raise SedacError naming the engine that is over the tolerance, if one is."""
        for row in [*self.engines, self.end_to_end]:
            if not row.error <= self.tolerance:
                raise SedacError(
                    f"engine {row.engine} differs from the original by {row.error:.2e}, over the"
                    f" tolerance of {self.tolerance:.0e}; nothing was kept (--atol sets it)"
                )


def validate(
    skeleton: Skeleton, directory: Path, manifest: Manifest, tolerance: float, rounding: Rounding
) -> BundleValidation:
    """Run the bundle in `directory` against what transformers makes of the same model.

    Its weights are rounded by `rounding` as the bundle's are.

    The text crosses every length at which the model's attention or rotary tables change, as far as
    the bundle has room.
    """
    chunks = text_chunks(manifest.max_cache_length, boundaries(skeleton.config))
    generator = torch.Generator().manual_seed(0)
    shape = (1, chunks[-1].stop)
    tokens = torch.randint(0, manifest.model.vocab_size, shape, generator=generator)
    runner = BundleRunner.engine_by_engine(directory, manifest)
    comparison = _BundleComparison(runner, tokens[0].numpy(), chunks)
    kept = _PREFILL + sum(_REST)
    with opened_reference(skeleton, rounding) as reference:
        logits = reference(tokens, kept, comparison.observe)
    return comparison.finish(logits.numpy(), tolerance)


def text_chunks(length: int, changes: list[int]) -> list[slice]:
    """The passes of a text past every one of `changes` that a cache of `length` has room for."""
    room = length - sum(_REST)
    furthest = max((b + _BEYOND for b in changes if b < length), default=0)
    sizes = (min(max(_PREFILL, furthest), room), *_REST) if room > 0 else (1,) * length
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


@dataclass
class _BundleComparison:
    """Follows the original through its layers: each engine runs once its own are done."""

    runner: BundleRunner
    tokens: Array
    chunks: list[slice]
    rows: list[ValidationRow] = field(default_factory=list)
    # residual streams from before the engine that is next, one per layer boundary
    hidden: list[Array] = field(default_factory=list)
    inputs: list[PassInputs] = field(default_factory=list)
    chained: list[Array] = field(default_factory=list)

    def observe(self, depth: int, hidden: torch.Tensor) -> None:
        """Take the original's residual stream [1, tokens, hidden] after `depth` layers."""
        self.hidden.append(hidden.numpy())
        if depth == 0:
            self.inputs = [self.runner.begin(chunk) for chunk in self.chunks]
            self.chained = self._embed()
            return
        engines = self.runner.manifest.engines.layers
        entry = next((e for e in engines if e.first_layer + e.num_layers == depth), None)
        if entry is not None:
            self.chained = self._layer(entry)
            del self.hidden[:-1]

    def finish(self, logits: Array, tolerance: float) -> BundleValidation:
        """Compare the newest positions' `logits`."""
        return BundleValidation(tolerance, self.rows, self._head(logits))

    def _expected(self, layer: int) -> list[Array]:
        """The stream `layer` layers on from the start of the next engine."""
        return [self.hidden[layer][:, chunk] for chunk in self.chunks]

    def _embed(self) -> list[Array]:
        """Check the embed engine; the residual streams that it starts, one per chunk."""
        row = ValidationRow("embed")
        embedded = []
        for inputs, expected in zip(self.inputs, self._expected(0), strict=True):
            x = self.runner.embed(self.tokens[inputs.positions], inputs)
            row.add(x.shape[1], x, expected)
            embedded.append(x)
        self.rows.append(row)
        return embedded

    def _layer(self, entry: LayerEngineEntry) -> list[Array]:
        """Check one layer engine and its kv engines; the chained hidden states after it."""
        row = ValidationRow(Path(entry.file).stem)
        caches, chain_caches = self._empty(entry), self._empty(entry)
        outputs = []
        for inputs, x, expected, link in zip(
            self.inputs, self._expected(0), self._expected(-1), self.chained, strict=True
        ):
            row.add(x.shape[1], self.runner.layers(entry, x, inputs, caches)["y"], expected)
            outputs.append(self.runner.layers(entry, link, inputs, chain_caches)["y"])
        self.rows.append(row)
        for index in range(entry.num_layers):
            filled = [
                caches[f"past_{kind}_{index}"].numpy()[:, :, : self.chunks[-1].stop]
                for kind in ("key", "value")
            ]
            self._key_value(entry.first_layer + index, filled, index)
        return outputs

    def _key_value(self, layer: int, expected: list[Array], index: int) -> None:
        """Check that a layer's kv engine fills its caches as the layer engine did."""
        length = self.chunks[-1].stop
        caches = self.runner.empty_caches(layer, 1, length)
        for inputs, x in zip(self.inputs, self._expected(index), strict=True):
            self.runner.key_value(layer, x, inputs, caches)
        row = ValidationRow(Path(self.runner.manifest.engines.key_value[layer].file).stem)
        for kind, wanted in zip(("key", "value"), expected, strict=True):
            row.add(length, caches[f"past_{kind}_0"].numpy()[:, :, :length], wanted)
        self.rows.append(row)

    def _head(self, logits: Array) -> ValidationRow:
        own, end_to_end = ValidationRow("head"), ValidationRow("end to end")
        first = self.chunks[-1].stop - logits.shape[1]
        for chunk, x, link in zip(self.chunks, self._expected(-1), self.chained, strict=True):
            left_out = max(0, first - chunk.start)
            expected = logits[:, max(chunk.start, first) - first : chunk.stop - first]
            for row, states in ((own, x), (end_to_end, link)):
                row.add(x.shape[1], self.runner.head(states[:, left_out:]), expected)
        self.rows.append(own)
        return end_to_end

    def _empty(self, entry: LayerEngineEntry) -> Caches:
        return self.runner.empty_caches(entry.first_layer, entry.num_layers, self.chunks[-1].stop)
