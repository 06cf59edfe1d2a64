"""Compare every engine of a bundle, and the whole chain, with the original model."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from sedac_export.arrays import Array
from sedac_export.bundle.manifest import LayerEngineEntry, Manifest
from sedac_export.bundle.sessions import open_session
from sedac_export.errors import SedacError
from sedac_export.model.reference import run_reference
from sedac_export.model.skeleton import Skeleton
from sedac_export.model.support import boundaries

# a prefill of at least so many tokens, and of as many beyond every boundary that the model
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
    """Per-engine rows on the original's own hidden states, and the chain end to end."""

    tolerance: float
    engines: list[ValidationRow]
    end_to_end: ValidationRow

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
    skeleton: Skeleton, directory: Path, manifest: Manifest, tolerance: float
) -> BundleValidation:
    """Run the bundle in `directory` against what transformers makes of the same model.

    The text crosses every length at which the model's attention or rotary tables change, as far as
    the bundle has room.
    """
    chunks = text_chunks(manifest.max_cache_length, boundaries(skeleton.config))
    generator = torch.Generator().manual_seed(0)
    shape = (1, chunks[-1].stop)
    tokens = torch.randint(0, manifest.model.vocab_size, shape, generator=generator)
    comparison = _BundleComparison(directory, manifest, tokens.numpy(), chunks)
    kept = _PREFILL + sum(_REST)
    logits = run_reference(skeleton, tokens, manifest.precision, kept, comparison.observe)
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

    directory: Path
    manifest: Manifest
    tokens: Array
    chunks: list[slice]
    rows: list[ValidationRow] = field(default_factory=list)
    # residual streams from before the engine that is next, one per layer boundary
    hidden: list[Array] = field(default_factory=list)
    contexts: list[dict[str, Array]] = field(default_factory=list)
    chained: list[Array] = field(default_factory=list)

    def observe(self, depth: int, hidden: torch.Tensor) -> None:
        """Take the original's residual stream [1, tokens, hidden] after `depth` layers."""
        self.hidden.append(hidden.numpy())
        if depth == 0:
            self.contexts, self.chained = self._embed()
            return
        engines = self.manifest.engines.layers
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

    def _embed(self) -> tuple[list[dict[str, Array]], list[Array]]:
        """Check the embed engine; its context tensors and residual streams, one per chunk."""
        session = open_session(self.directory / self.manifest.engines.embed)
        names = [output.name for output in session.get_outputs()]
        row = ValidationRow("embed")
        contexts, embedded = [], []
        for chunk, expected in zip(self.chunks, self._expected(0), strict=True):
            positions = np.arange(chunk.start, chunk.stop, dtype=np.int64)[None]
            feeds = {"input_ids": self.tokens[:, chunk], "position_ids": positions}
            outputs = dict(zip(names, _run(session, feeds), strict=True))
            embedded.append(outputs.pop("x"))
            row.add(len(positions[0]), embedded[-1], expected)
            contexts.append(outputs)
        self.rows.append(row)
        return contexts, embedded

    def _layer(self, entry: LayerEngineEntry) -> list[Array]:
        """Check one layer engine and its kv engines; the chained hidden states after it."""
        session = open_session(self.directory / entry.file)
        row = ValidationRow(Path(entry.file).stem)
        cache, chain_cache = self._empty(entry), self._empty(entry)
        outputs = []
        for chunk, x, expected, link, context in zip(
            self.chunks,
            self._expected(0),
            self._expected(-1),
            self.chained,
            self.contexts,
            strict=True,
        ):
            y, cache = _step(session, x, chunk, context, cache)
            row.add(x.shape[1], y, expected)
            link, chain_cache = _step(session, link, chunk, context, chain_cache)
            outputs.append(link)
        self.rows.append(row)
        for index in range(entry.num_layers):
            self._key_value(entry.first_layer + index, cache, index)
        return outputs

    def _key_value(self, layer: int, cache: dict[str, Array], index: int) -> None:
        """Check that a layer's kv engine fills its cache as the layer engine does."""
        entry = self.manifest.engines.key_value[layer]
        session = open_session(self.directory / entry.file)
        expected = [cache[f"past_{kind}_{index}"] for kind in ("key", "value")]
        present = [np.zeros_like(array) for array in expected]
        states = zip(self.chunks, self._expected(index), self.contexts, strict=True)
        for chunk, x, context in states:
            feeds = {"x": x, "write_index": np.array([chunk.start], dtype=np.int64)}
            feeds |= {"past_key_0": present[0], "past_value_0": present[1]}
            present = _run(session, feeds | context)
        row = ValidationRow(Path(entry.file).stem)
        for got, wanted in zip(present, expected, strict=True):
            row.add(self.chunks[-1].stop, got, wanted)
        self.rows.append(row)

    def _head(self, logits: Array) -> ValidationRow:
        session = open_session(self.directory / self.manifest.engines.head)
        own, end_to_end = ValidationRow("head"), ValidationRow("end to end")
        first = self.chunks[-1].stop - logits.shape[1]
        for chunk, x, link in zip(self.chunks, self._expected(-1), self.chained, strict=True):
            left_out = max(0, first - chunk.start)
            expected = logits[:, max(chunk.start, first) - first : chunk.stop - first]
            for row, states in ((own, x), (end_to_end, link)):
                row.add(x.shape[1], _run(session, {"x": states[:, left_out:]})[0], expected)
        self.rows.append(own)
        return end_to_end

    def _empty(self, entry: LayerEngineEntry) -> dict[str, Array]:
        length = self.chunks[-1].stop
        cache = {}
        for index in range(entry.num_layers):
            kv = self.manifest.key_value_heads[entry.first_layer + index]
            for kind in ("key", "value"):
                shape = (1, kv.heads, length, kv.head_size)
                cache[f"past_{kind}_{index}"] = np.zeros(shape, dtype=np.float32)
        return cache


def _step(
    session: onnxruntime.InferenceSession,
    x: Array,
    chunk: slice,
    context: dict[str, Array],
    cache: dict[str, Array],
) -> tuple[Array, dict[str, Array]]:
    """Run a layer engine on one chunk: its y and the cache for the next chunk."""
    lengths = {
        "seqlens_k": np.array([chunk.stop - 1], dtype=np.int32),
        "total_sequence_length": np.array(chunk.stop, dtype=np.int32),
    }
    outputs = dict(
        zip(
            [output.name for output in session.get_outputs()],
            _run(session, {"x": x} | lengths | cache | context),
            strict=True,
        )
    )
    present = {name: outputs[name.replace("past", "present")] for name in cache}
    return outputs["y"], present


def _run(session: onnxruntime.InferenceSession, feeds: dict[str, Array]) -> list[Array]:
    known = {value.name for value in session.get_inputs()}
    outputs: list[Array] = session.run(None, {k: v for k, v in feeds.items() if k in known})
    return outputs
