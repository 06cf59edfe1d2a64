"""Run a bundle's engines in ONNX Runtime, pass by pass."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sedac_export.arrays import Array, Floats
from sedac_export.bundle import Bundle
from sedac_export.bundle.manifest import LayerEngineEntry, Manifest
from sedac_export.bundle.sessions import (
    THREADS,
    Caches,
    Engine,
    empty_cache,
    exact_graph,
    load_engine,
    shipped_graph,
)
from sedac_export.errors import SedacError

LoadEngine = Callable[[str], Engine]


@dataclass(frozen=True)
class PassInputs:
    """Consecutive positions, and by name what engines take of them beside the residual stream."""

    positions: slice
    arrays: dict[str, Array]


class BundleRunner:
    """The engines of one bundle. Whoever calls holds the hidden states and the caches.

    load gives the engine in a file of the bundle. Hidden states are fp32 [1, tokens, hidden].
    """

    def __init__(self, manifest: Manifest, load: LoadEngine) -> None:
        self.manifest, self.load = manifest, load

    @classmethod
    def of(cls, bundle: Bundle, threads: int = THREADS) -> "BundleRunner":
        """For many passes: engines are loaded once, when they are first asked for, and stay."""

        def load(file: str) -> Engine:
            return load_engine(bundle, file, threads)

        return cls(bundle.manifest, functools.cache(load))

    @classmethod
    def engine_by_engine(cls, directory: Path, manifest: Manifest) -> "BundleRunner":
        """For few passes over the files in `directory`: only the newest engine stays loaded.

        Products with quantized weights are computed in fp32.
        """

        def load(file: str) -> Engine:
            path = directory / file
            threads = os.cpu_count() or 1
            return Engine(exact_graph(path), threads, path.parent, optimized=False)

        return cls(manifest, functools.lru_cache(maxsize=1)(load))

    @classmethod
    def as_shipped(cls, directory: Path, manifest: Manifest) -> "BundleRunner":
        """As `engine_by_engine`, but engines compute as they do where the bundle is used."""

        def load(file: str) -> Engine:
            path = directory / file
            graph = shipped_graph(path.read_bytes())
            return Engine(graph, os.cpu_count() or 1, path.parent)

        return cls(manifest, functools.lru_cache(maxsize=1)(load))

    def begin(self, positions: slice) -> PassInputs:
        """Start a pass at `positions`: its context tensors are computed."""
        start, stop = positions.start, positions.stop
        ids = np.arange(start, stop, dtype=np.int64)[None]
        arrays: dict[str, Array] = {
            "position_ids": ids,
            "slots": np.zeros(stop - start, dtype=np.int64),
            "seqlens_k": np.array([stop - 1], dtype=np.int32),
            "total_sequence_length": np.array(stop, dtype=np.int32),
            "write_index": np.array([start], dtype=np.int64),
        }
        contexts = self.manifest.engines.contexts
        if contexts is not None:
            arrays |= self.load(contexts).run({"position_ids": ids})
        return PassInputs(positions, arrays)

    def embed(self, tokens: Array, inputs: PassInputs) -> Floats:
        """The residual stream before the first layer, of token ids int64 [tokens]."""
        feeds = inputs.arrays | {"input_ids": tokens[None]}
        x: Floats = self.load(self.manifest.engines.embed).run(feeds)["x"]
        return x

    def layers(
        self, entry: LayerEngineEntry, x: Floats, inputs: PassInputs, caches: Caches
    ) -> dict[str, Array]:
        """y, stability and, with a probe, risk of a layer or attention engine; fills `caches`."""
        return self.load(entry.file).run(inputs.arrays | {"x": x}, caches)

    def key_value(self, layer: int, x: Floats, inputs: PassInputs, caches: Caches) -> None:
        """Fill the `caches` of one layer by its kv engine."""
        file = self.manifest.engines.key_value[layer].file
        self.load(file).run(inputs.arrays | {"x": x}, caches)

    def head(self, x: Floats) -> Floats:
        """Logits, fp32 [1, tokens, vocabulary]."""
        logits: Floats = self.load(self.manifest.engines.head).run({"x": x})["logits"]
        return logits

    def lens(self, depth: int, x: Floats) -> Floats:
        """`x` after `depth` layers as the head takes it: unchanged where there is no lens."""
        file = next((e.lens for e in self.manifest.engines.exits if e.depth == depth), None)
        return x if file is None else self.load(file).run({"x": x})["y"]

    def exit_signals(self, depth: int, x: Floats, stabilities: Floats) -> Floats:
        """margin, entropy and learned, fp32 [1, tokens, 3].

        stabilities: fp32 [1, tokens, 3], of the depths up to `depth`. Raises SedacError where the
        bundle has no exit engine.
        """
        file = next((e.file for e in self.manifest.engines.exits if e.depth == depth), None)
        if file is None:
            raise SedacError(
                f"the bundle has no exit engine at depth {depth}; train with sedac-export"
                " train-probes"
            )
        signals: Floats = self.load(file).run({"x": x, "stability": stabilities})["signals"]
        return signals

    def empty_caches(self, first_layer: int, num_layers: int, length: int) -> Caches:
        """Zeroed caches of `length` positions for an engine of these layers."""
        return {
            f"past_{kind}_{place}": empty_cache(kv.heads, length, kv.head_size)
            for place, kv in enumerate(self.manifest.key_value_heads[first_layer:][:num_layers])
            for kind in ("key", "value")
        }
