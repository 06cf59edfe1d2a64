"""What a calibrated quantizer learns from text: the inputs of each layer's products."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper

from sedac_export.arrays import Array, Floats
from sedac_export.bundle.sessions import Caches, Engine, empty_cache
from sedac_export.graph.kernels import Heads
from sedac_export.graph.quantized_graph import product_inputs
from sedac_export.graph.trace import TracedGraph
from sedac_export.model.skeleton import Skeleton


@dataclass
class Calibration:
    """Takes texts through the layers, each quantized for what those before it make of the text.

    windows: token ids, int64 [tokens] each, all of one length. heads: the layers' caches.
    """

    skeleton: Skeleton
    windows: list[Array]
    heads: list[Heads]
    hidden: list[Array] = field(default_factory=list)
    inputs: dict[str, Array] = field(default_factory=dict)

    def begin(self, embed: Path, contexts: Path | None) -> None:
        """Start from what the engine `embed` gives, with the tensors of `contexts` beside it."""
        length = len(self.windows[0])
        positions = {"position_ids": np.arange(length)[None]}
        self.inputs = {
            "seqlens_k": np.array([length - 1], dtype=np.int32),
            "total_sequence_length": np.array(length, dtype=np.int32),
        }
        if contexts is not None:
            self.inputs |= Engine(contexts, _threads()).run(positions)
        engine = Engine(embed, _threads())
        for window in self.windows:
            self.hidden.append(engine.run(positions | {"input_ids": window[None]})["x"])

    def observe(self, graph: TracedGraph, sources: dict[str, str], layer: int) -> dict[str, Floats]:
        """By the name of each weight of `layer` in the checkpoint, the sum over the text of x x^T.

        x is what the weight is multiplied with; fp32 [columns, columns]. sources: where the
        checkpoint holds the weights of `graph`, the layer's.
        """
        read = product_inputs(graph)
        session = self._unquantized(graph, sources, set(read.values()))
        names = [name for name in dict.fromkeys(read.values()) if name not in self._known(session)]
        sums: dict[str, Floats] = {}
        for x in self.hidden:
            feeds = self._feeds(session, x, layer)
            seen = feeds | dict(zip(names, session.run(names, feeds), strict=True))
            for name in set(read.values()):
                rows = seen[name].reshape(-1, seen[name].shape[-1])
                sums[name] = sums.get(name, np.float32(0)) + rows.T @ rows
        return {sources[weight]: sums[name] for weight, name in read.items()}

    def advance(self, layer: onnx.ModelProto, index: int, weights: Path) -> None:
        """Run the engine `layer`, whose weights are below `weights`, over all texts."""
        engine = Engine(layer.SerializeToString(), _threads(), weights)
        for place, x in enumerate(self.hidden):
            self.hidden[place] = engine.run(self.inputs | {"x": x}, self._caches(index))["y"]

    def _unquantized(
        self, graph: TracedGraph, sources: dict[str, str], outputs: set[str]
    ) -> onnxruntime.InferenceSession:
        """A session over `graph` with the checkpoint's weights, which also gives `outputs`."""
        model = onnx.ModelProto()
        model.CopyFrom(graph.model)
        inputs = {value.name for value in model.graph.input}
        for name in sorted(outputs - inputs):
            model.graph.output.append(helper.make_empty_tensor_value_info(name))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = _threads()
        options.log_severity_level = 3
        weights = [self._weight(sources[name]) for name in graph.weights]
        options.add_external_initializers(list(graph.weights), weights)
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def _weight(self, source: str) -> onnxruntime.OrtValue:
        whole = torch.cat(list(self.skeleton.checkpoint.pieces(source))).float()
        return onnxruntime.OrtValue.ortvalue_from_numpy(whole.numpy())

    def _feeds(
        self, session: onnxruntime.InferenceSession, x: Array, layer: int
    ) -> dict[str, Array]:
        caches = {name: cache.numpy() for name, cache in self._caches(layer).items()}
        known = self._known(session)
        feeds = self.inputs | caches | {"x": x}
        return {name: value for name, value in feeds.items() if name in known}

    def _known(self, session: onnxruntime.InferenceSession) -> set[str]:
        return {value.name for value in session.get_inputs()}

    def _caches(self, layer: int) -> Caches:
        heads, length = self.heads[layer], len(self.windows[0]) + 1
        return {
            f"past_{kind}_0": empty_cache(heads.count, length, heads.size)
            for kind in ("key", "value")
        }


def _threads() -> int:
    return os.cpu_count() or 1
