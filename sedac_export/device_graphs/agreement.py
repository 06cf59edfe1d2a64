"""How far engines are from the bundle's ONNX Runtime engines, which the build compared with eager.

The same comparison serves the portable graphs in ONNX Runtime, the plans built from them on a GPU,
and the graphs for ONNX Runtime's CUDA provider: it is given a function that runs an engine.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sedac_export.arrays import Array, Floats
from sedac_export.bundle.agreement_row import AgreementRow, Gates
from sedac_export.bundle.manifest import Manifest
from sedac_export.bundle.plan_entries import PortableGraphs
from sedac_export.bundle.runner import BundleRunner, PassInputs
from sedac_export.bundle.sessions import Caches

# runs the engine of a graph on arrays, whose fp32 it casts to what that takes; it ignores arrays
# that the engine does not take
RunGraph = Callable[[str, dict[str, Array]], dict[str, Array]]

# prefill, verification of a draft on a filled cache, decoding
_CHUNKS = (200, 7, 1)


def compare(
    directory: Path, manifest: Manifest, portable: PortableGraphs, run: RunGraph, gates: Gates
) -> list[dict[str, Any]]:
    """Each engine on the reference's own hidden states, then the chain: a report of each.

    The caches hold noise where nothing was written: what a mask hides must not show.
    """
    rng = np.random.default_rng(0)
    chunks = list(_chunks(manifest.max_cache_length, manifest))
    tokens = rng.integers(0, manifest.model.vocab_size, chunks[-1].stop)
    reference = BundleRunner.engine_by_engine(directory, manifest)
    comparison = _GraphComparison(reference, portable, run, chunks, tokens, rng, gates.epsilon)
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
    reference: BundleRunner
    portable: PortableGraphs
    run: RunGraph
    chunks: list[slice]
    tokens: Array
    rng: np.random.Generator
    epsilon: float

    @property
    def manifest(self) -> Manifest:
        return self.reference.manifest

    def rows(self) -> Iterator[AgreementRow]:
        inputs = [self.reference.begin(chunk) for chunk in self.chunks]
        expected = [self.reference.embed(self.tokens[i.positions], i) for i in inputs]
        row, chained = self._embed(expected)
        yield row
        own_contexts = [self._contexts(i) for i in inputs]
        if self.portable.contexts_graph is not None:
            # scaled rotary embeddings differ where texts are long
            last = self.reference.begin(self._last_positions())
            yield self._contexts_row([*own_contexts, self._contexts(last)], [*inputs, last])
        for index, entry in enumerate(self.portable.layers):
            after = self._reference_layers(index, expected, inputs)
            row = AgreementRow(Path(self.manifest.engines.layers[index].file).stem)
            own = self._layers(index, expected, own_contexts)
            for got, wanted in zip(own, after, strict=True):
                row.add(got["y"], wanted["y"])
                # where it is left to the host, the graph has none
                if "stability" in got:
                    row.add_stability(got["stability"], wanted["stability"])
            yield row
            for layer in range(entry.first_layer, entry.first_layer + entry.num_layers):
                yield self._key_value(layer, expected, inputs, own_contexts)
            chained = [out["y"] for out in self._layers(index, chained, own_contexts)]
            expected = [out["y"] for out in after]
        yield from self._head(expected, chained)

    def _embed(self, expected: list[Floats]) -> tuple[AgreementRow, list[Array]]:
        row = AgreementRow("embed")
        embedded = []
        for chunk, wanted in zip(self.chunks, expected, strict=True):
            feeds = {"input_ids": self.tokens[None, chunk], "position_ids": _ids(chunk)}
            embedded.append(self.run(self.portable.embed, feeds)["x"])
            row.add(embedded[-1], wanted)
        return row, embedded

    def _contexts(self, inputs: PassInputs) -> dict[str, Array]:
        """What the contexts engine under test gives."""
        graph = self.portable.contexts_graph
        return {} if graph is None else self.run(graph, {"position_ids": _ids(inputs.positions)})

    def _last_positions(self) -> slice:
        length, chunk = self.manifest.max_cache_length, self.chunks[0]
        return slice(length - (chunk.stop - chunk.start), length)

    def _contexts_row(
        self, own_contexts: list[dict[str, Array]], inputs: list[PassInputs]
    ) -> AgreementRow:
        """Compare the numbers of all contexts of a position: single ones may be all zeros."""
        row = AgreementRow("contexts")
        for own, wanted in zip(own_contexts, inputs, strict=True):
            names = sorted(own)
            row.add(_joined(own, names), _joined(wanted.arrays, names))
        return row

    def _reference_layers(
        self, index: int, before: list[Floats], inputs: list[PassInputs]
    ) -> list[dict[str, Array]]:
        """What ONNX Runtime's engine gives for each chunk."""
        entry = self.manifest.engines.layers[index]
        caches = self._empty(entry.first_layer, entry.num_layers)
        return [
            self.reference.layers(entry, x, i, caches) for i, x in zip(inputs, before, strict=True)
        ]

    def _layers(
        self, index: int, before: list[Array], contexts: list[dict[str, Array]]
    ) -> Iterator[dict[str, Array]]:
        """What the engine under test gives for each chunk."""
        entry = self.portable.layers[index]
        caches = self._noise(entry.first_layer, entry.num_layers)
        for chunk, x, context in zip(self.chunks, before, contexts, strict=True):
            feeds = {"x": x} | _lengths(chunk) | self._masks(chunk) | context | caches
            output = self.run(entry.file, feeds)
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
        before: list[Floats],
        inputs: list[PassInputs],
        own_contexts: list[dict[str, Array]],
    ) -> AgreementRow:
        """Compare what two kv engines of a layer fill its cache with."""
        own, expected = self._noise(layer, 1), self._empty(layer, 1)
        for x, i, context in zip(before, inputs, own_contexts, strict=True):
            feeds = {"x": x} | _lengths(i.positions) | context | own
            own = _carried(self.run(self.portable.key_value[layer], feeds))
            self.reference.key_value(layer, x, i, expected)
        row = AgreementRow(Path(self.manifest.engines.key_value[layer].file).stem)
        written = slice(self.chunks[-1].stop)
        for name, wanted in expected.items():
            row.add(_flat(own[name][:, :, written]), _flat(wanted.numpy()[:, :, written]))
        return row

    def _head(self, expected: list[Array], chained: list[Array]) -> Iterator[AgreementRow]:
        own, chain = AgreementRow("head"), AgreementRow("end to end")
        for x, link in zip(expected, chained, strict=True):
            for start in range(0, x.shape[1], 16):  # as many as the head is built for
                part = slice(start, start + 16)
                wanted = self.reference.head(x[:, part])
                own.add_logits(self._logits(x[:, part]), wanted, self.epsilon)
                chain.add_logits(self._logits(link[:, part]), wanted, self.epsilon)
        yield own
        yield chain

    def _logits(self, x: Array) -> Array:
        return self.run(self.portable.head, {"x": x})["logits"]

    def _empty(self, first: int, count: int) -> Caches:
        """Caches for the reference."""
        return self.reference.empty_caches(first, count, self.chunks[-1].stop)

    def _noise(self, first: int, count: int) -> dict[str, Array]:
        """Caches for the engine under test, as long as it is built for."""
        caches = {}
        for place in range(count):
            kv = self.manifest.key_value_heads[first + place]
            shape = (1, kv.heads, self.manifest.max_cache_length, kv.head_size)
            for kind in ("key", "value"):
                noise = self.rng.standard_normal(shape).astype(np.float32)
                caches[f"past_{kind}_{place}"] = noise
        return caches


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


def _lengths(positions: slice) -> dict[str, Array]:
    """Where a pass at `positions` lies in the caches, as one kind of graphs or the other asks."""
    return {
        "write_index": np.array([positions.start], dtype=np.int64),
        "seqlens_k": np.array([positions.stop - 1], dtype=np.int32),
        "total_sequence_length": np.array(positions.stop, dtype=np.int32),
    }


def _ids(positions: slice) -> Array:
    return np.arange(positions.start, positions.stop, dtype=np.int64)[None]


def _joined(contexts: dict[str, Array], names: list[str]) -> Array:
    """The named tensors [1, tokens, ...] side by side, [1, tokens, n]."""
    tensors = [contexts[name] for name in names]
    return np.concatenate([t.reshape(*t.shape[:2], -1) for t in tensors], axis=-1)


def _carried(outputs: dict[str, Array]) -> dict[str, Array]:
    """The caches that one pass hands to the next."""
    names = [name for name in outputs if name.startswith("present_")]
    return {name.replace("present_", "past_"): outputs[name] for name in names}


def _flat(cache: Array) -> Array:
    """[1, heads, tokens, size] with all heads of a token in a row."""
    return cache.transpose(0, 2, 1, 3).reshape(1, cache.shape[2], -1)
