"""How far engines are from the bundle's ONNX Runtime engines, which the build compared with eager.

The same comparison serves the portable graphs in ONNX Runtime and the plans on a GPU: it is given a
function that runs an engine.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from sedac_export.arrays import Array
from sedac_export.bundle.manifest import Manifest
from sedac_export.bundle.plan_entries import PortableGraphs
from sedac_export.bundle.sessions import open_session

# runs the engine of a portable graph on arrays whose fp32 it casts to what the engine takes
RunGraph = Callable[[str, dict[str, Array]], dict[str, Array]]

# prefill, verification of a draft on a filled cache, decoding
_CHUNKS = (200, 7, 1)


@dataclass(frozen=True)
class Gates:
    """What agreement must reach; rows are tokens.

    cosine: 5th percentile of the rows' cosines. difference: 95th percentile of the rows' relative
    L2 differences; also bounds the largest difference of stabilities. argmax: share of the rows
    of logits with the same largest, where two that are closer than epsilon, relatively, count as
    the same: the precision cannot tell them apart.
    """

    cosine: float
    difference: float
    argmax: float
    epsilon: float


GATES = {
    "fp32": Gates(0.99999, 0.001, 0.99, 2**-23),
    "fp16": Gates(0.999, 0.02, 0.99, 2**-10),
    "bf16": Gates(0.99, 0.1, 0.95, 2**-7),
}


@dataclass
class AgreementRow:
    """Agreement of one engine, or of the chain, with what it stands for."""

    engine: str
    stability: float = 0.0
    cosines: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    matches: list[bool] = field(default_factory=list)

    def add_logits(self, got: Array, expected: Array, epsilon: float) -> None:
        """Count rows of logits in, and whether they choose the same token."""
        self.add(got, expected)
        chosen = np.take_along_axis(expected, got.argmax(-1)[..., None], -1)
        top = expected.max(-1, keepdims=True)
        self.matches += (top - chosen <= epsilon * np.abs(top)).ravel().tolist()

    def add(self, got: Array, expected: Array) -> None:
        """Count the rows of an output [..., n] in."""
        size = expected.shape[-1]
        a, b = got.reshape(-1, size).astype(np.float64), expected.reshape(-1, size)
        norms = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
        cosine = (a * b).sum(-1) / np.maximum(norms[0] * norms[1], 1e-30)
        difference = np.linalg.norm(a - b, axis=-1) / np.maximum(norms[1], 1e-30)
        self.cosines += np.nan_to_num(cosine, nan=-1.0).tolist()
        self.differences += np.nan_to_num(difference, nan=np.inf).tolist()

    def add_stability(self, got: Array, expected: Array) -> None:
        """Count stabilities in, by their largest absolute difference."""
        difference = np.nan_to_num(np.abs(got - expected), nan=np.inf)
        self.stability = max(self.stability, float(difference.max()))

    def report(self, gates: Gates) -> dict[str, Any]:
        """The figures and whether they pass `gates`."""
        cosine = float(np.percentile(self.cosines, 5))
        difference = float(np.percentile(self.differences, 95))
        argmax = float(np.mean(self.matches)) if self.matches else None
        passed = cosine >= gates.cosine and difference <= gates.difference
        passed = passed and (argmax is None or argmax >= gates.argmax)
        passed = passed and self.stability <= gates.difference
        return {
            "engine": self.engine,
            "cosine_p5": cosine,
            "relative_l2_p95": min(difference, 1e9),
            "argmax_agreement": argmax,
            "stability_difference": min(self.stability, 1e9),
            "passed": bool(passed),
        }


def compare(
    directory: Path, manifest: Manifest, portable: PortableGraphs, run: RunGraph, gates: Gates
) -> list[dict[str, Any]]:
    """Each engine on the reference's own hidden states, then the chain: a report of each.

    The caches hold noise where nothing was written: what a mask hides must not show.
    """
    rng = np.random.default_rng(0)
    chunks = list(_chunks(manifest.max_cache_length, manifest))
    tokens = rng.integers(0, manifest.model.vocab_size, (1, chunks[-1].stop))
    comparison = _GraphComparison(
        directory, manifest, portable, run, chunks, tokens, rng, gates.epsilon
    )
    return [row.report(gates) for row in comparison.rows()]


def _chunks(length: int, manifest: Manifest) -> Iterator[slice]:
    options = [plans.options for plans in manifest.plans.values()]
    largest = min([length - 8, *(o.max_prefill_chunk for o in options)])
    start = 0
    for size in (min(_CHUNKS[0], largest), *_CHUNKS[1:]):
        if size > 0 and start + size <= length:
            yield slice(start, start + size)
            start += size


@dataclass
class _GraphComparison:
    directory: Path
    manifest: Manifest
    portable: PortableGraphs
    run: RunGraph
    chunks: list[slice]
    tokens: Array
    rng: np.random.Generator
    epsilon: float

    def rows(self) -> Iterator[AgreementRow]:
        expected, contexts = self._reference_embed()
        row, chained, own_contexts = self._embed(expected)
        yield row
        for index, entry in enumerate(self.portable.layers):
            after = self._reference_layers(index, expected, contexts)
            row = AgreementRow(Path(self.manifest.engines.layers[index].file).stem)
            own = self._layers(index, expected, own_contexts)
            for got, wanted in zip(own, after, strict=True):
                row.add(got["y"], wanted["y"])
                row.add_stability(got["stability"], wanted["stability"])
            yield row
            for layer in range(entry.first_layer, entry.first_layer + entry.num_layers):
                yield self._key_value(layer, expected, contexts, own_contexts)
            chained = [out["y"] for out in self._layers(index, chained, own_contexts)]
            expected = [out["y"] for out in after]
        yield from self._head(expected, chained)

    def _reference_embed(self) -> tuple[list[Array], list[dict[str, Array]]]:
        engine = open_session(self.directory / self.manifest.engines.embed)
        outputs = [run_session(engine, self._inputs(chunk)) for chunk in self.chunks]
        return [output.pop("x") for output in outputs], outputs

    def _inputs(self, chunk: slice) -> dict[str, Array]:
        positions = np.arange(chunk.start, chunk.stop, dtype=np.int64)[None]
        return {"input_ids": self.tokens[:, chunk], "position_ids": positions}

    def _embed(
        self, expected: list[Array]
    ) -> tuple[AgreementRow, list[Array], list[dict[str, Array]]]:
        row = AgreementRow("embed")
        outputs = [self.run(self.portable.embed, self._inputs(chunk)) for chunk in self.chunks]
        embedded = [output.pop("x") for output in outputs]
        for got, wanted in zip(embedded, expected, strict=True):
            row.add(got, wanted)
        return row, embedded, outputs

    def _reference_layers(
        self, index: int, before: list[Array], contexts: list[dict[str, Array]]
    ) -> list[dict[str, Array]]:
        """What ONNX Runtime's engine gives for each chunk."""
        entry = self.manifest.engines.layers[index]
        engine = open_session(self.directory / entry.file)
        caches = self._caches(entry.first_layer, entry.num_layers, noise=False)
        outputs = []
        for chunk, x, context in zip(self.chunks, before, contexts, strict=True):
            lengths = {
                "seqlens_k": np.array([chunk.stop - 1], dtype=np.int32),
                "total_sequence_length": np.array(chunk.stop, dtype=np.int32),
            }
            outputs.append(run_session(engine, {"x": x} | lengths | context | caches))
            caches = _carried(outputs[-1])
        return outputs

    def _layers(
        self, index: int, before: list[Array], contexts: list[dict[str, Array]]
    ) -> Iterator[dict[str, Array]]:
        """What the engine under test gives for each chunk."""
        entry = self.portable.layers[index]
        caches = self._caches(entry.first_layer, entry.num_layers, noise=True)
        for chunk, x, context in zip(self.chunks, before, contexts, strict=True):
            feeds = {"x": x, "write_index": np.array([chunk.start], dtype=np.int64)}
            output = self.run(entry.file, feeds | self._masks(chunk) | context | caches)
            caches = _carried(output)
            yield output

    def _masks(self, chunk: slice) -> dict[str, Array]:
        return {
            name: visible(chunk, self.manifest.max_cache_length, window)
            for name, window in self.portable.masks.items()
        }

    def _key_value(
        self,
        layer: int,
        before: list[Array],
        contexts: list[dict[str, Array]],
        own_contexts: list[dict[str, Array]],
    ) -> AgreementRow:
        """Compare what two kv engines of a layer fill its cache with."""
        reference = self.manifest.engines.key_value[layer].file
        engine = open_session(self.directory / reference)
        own, expected = self._caches(layer, 1, noise=True), self._caches(layer, 1, noise=False)
        for place, (chunk, x) in enumerate(zip(self.chunks, before, strict=True)):
            feeds = {"x": x, "write_index": np.array([chunk.start], dtype=np.int64)}
            file = self.portable.key_value[layer]
            own = _carried(self.run(file, feeds | own_contexts[place] | own))
            expected = _carried(run_session(engine, feeds | contexts[place] | expected))
        row = AgreementRow(Path(reference).stem)
        length = self.chunks[-1].stop
        for name, wanted in expected.items():
            row.add(_flat(own[name][:, :, :length]), _flat(wanted[:, :, :length]))
        return row

    def _head(self, expected: list[Array], chained: list[Array]) -> Iterator[AgreementRow]:
        engine = open_session(self.directory / self.manifest.engines.head)
        own, chain = AgreementRow("head"), AgreementRow("end to end")
        for x, link in zip(expected, chained, strict=True):
            for start in range(0, x.shape[1], 16):  # as many as the head is built for
                part = slice(start, start + 16)
                wanted = run_session(engine, {"x": x[:, part]})["logits"]
                own.add_logits(self._logits(x[:, part]), wanted, self.epsilon)
                chain.add_logits(self._logits(link[:, part]), wanted, self.epsilon)
        yield own
        yield chain

    def _logits(self, x: Array) -> Array:
        return self.run(self.portable.head, {"x": x})["logits"]

    def _caches(self, first: int, count: int, noise: bool) -> dict[str, Array]:
        caches = {}
        for place in range(count):
            kv = self.manifest.key_value_heads[first + place]
            shape = (1, kv.heads, self.manifest.max_cache_length, kv.head_size)
            for kind in ("key", "value"):
                fill = self.rng.standard_normal(shape) if noise else np.zeros(shape)
                caches[f"past_{kind}_{place}"] = fill.astype(np.float32)
        return caches


def run_session(engine: onnxruntime.InferenceSession, feeds: dict[str, Array]) -> dict[str, Array]:
    """Outputs by name; of `feeds` the engine gets those that it knows."""
    known = {value.name for value in engine.get_inputs()}
    names = [output.name for output in engine.get_outputs()]
    given = {name: array for name, array in feeds.items() if name in known}
    return dict(zip(names, engine.run(None, given), strict=True))


def visible(chunk: slice, length: int, window: int) -> Array:
    """The mask [1, 1, tokens, length] of the positions of `chunk`: itself and those before it.

    window is how many of them at most, 0 for all.
    """
    positions = np.arange(chunk.start, chunk.stop)[:, None]
    seen = np.arange(length)[None]
    mask = seen <= positions
    if window:
        mask &= seen > positions - window
    return mask[None, None]


def _carried(outputs: dict[str, Array]) -> dict[str, Array]:
    """The caches that one pass hands to the next."""
    names = [name for name in outputs if name.startswith("present_")]
    return {name.replace("present_", "past_"): outputs[name] for name in names}


def _flat(cache: Array) -> Array:
    """[1, heads, tokens, size] with all heads of a token in a row."""
    return cache.transpose(0, 2, 1, 3).reshape(1, cache.shape[2], -1)
