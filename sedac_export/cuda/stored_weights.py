"""Read the weights that a bundle's engines share, by their names in the model."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto, helper

from sedac_export.arrays import Array
from sedac_export.bundle import Bundle
from sedac_export.cuda.layer_weights import WeightReader
from sedac_export.cuda.weight_blocks import Parts
from sedac_export.errors import SedacError
from sedac_export.graph.quantized_graph import SCALES, ZERO_POINTS, weight_of_part


class StoredWeights:
    """The weights of `bundle`, mapped from its files."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        engines = bundle.manifest.engines
        self.embed, self.head = self._weights(engines.embed), self._weights(engines.head)
        self.monolith = {item.name: item for item in self._weights(engines.monolith.file)}

    def reader(self, layer: int, suffix: str = "") -> WeightReader:
        """Gives weights of `layer` by their names below it, or the parts `suffix` of them."""
        prefix = self._prefix(layer)

        def read(name: str) -> torch.Tensor:
            item = self.monolith.get(f"{prefix}{name}{suffix}")
            if item is None:
                raise self._other_model(f"no weight {name} of layer {layer}")
            return torch.from_numpy(self._array(item))

        return read

    def matrices(self, layer: int) -> Iterator[Parts]:
        """All matrices of `layer`."""
        prefix = self._prefix(layer)
        held = {name: item for name, item in self.monolith.items() if name.startswith(prefix)}
        for name, item in held.items():
            if len(item.dims) > 1 and not weight_of_part(name)[1]:
                yield self._parts(item, held)

    def vectors(self, layer: int) -> list[Array]:
        """All vectors of `layer`."""
        prefix = self._prefix(layer)
        items = self.monolith.items()
        found = [item for name, item in items if name.startswith(prefix) and len(item.dims) == 1]
        return [self._array(item) for item in found]

    def embedding(self) -> Parts:
        """The embedding's rows, [vocabulary, hidden]."""
        return self._parts(self._matrix(self.embed), _by_name(self.embed))

    def projection(self) -> Parts:
        """The matrix to logits, [vocabulary, hidden]."""
        return self._parts(self._matrix(self.head), _by_name(self.head))

    def final_norm(self) -> Array:
        """The weight of the norm before the projection, [hidden]."""
        found = [item for item in self.head if len(item.dims) == 1]
        return self._array(self._only(found, "vectors"))

    def tied(self) -> bool:
        """Whether embedding and projection are one matrix."""
        embed, head = (_place(self._matrix(items)) for items in (self.embed, self.head))
        return embed == head

    def _prefix(self, layer: int) -> str:
        # a monolith of one layer is that layer's graph, its names unchanged
        return f"layer_{layer}.layer." if self.bundle.manifest.model.num_layers > 1 else "layer."

    def _weights(self, file: str) -> list[TensorProto]:
        return [item for item in self.bundle.graph(file).graph.initializer if item.external_data]

    def _matrix(self, items: list[TensorProto]) -> TensorProto:
        found = [i for i in items if len(i.dims) > 1 and not weight_of_part(i.name)[1]]
        return self._only(found, "matrices")

    def _only(self, found: list[TensorProto], what: str) -> TensorProto:
        if len(found) != 1:
            raise self._other_model(f"{len(found)} {what} before or after its layers")
        return found[0]

    def _parts(self, matrix: TensorProto, held: Mapping[str, TensorProto]) -> Parts:
        parts = {suffix: held.get(f"{matrix.name}{suffix}") for suffix in ("", SCALES, ZERO_POINTS)}
        return {suffix: self._array(item) for suffix, item in parts.items() if item is not None}

    def _array(self, item: TensorProto) -> Array:
        place = _place(item)
        mapped: Array = np.memmap(
            self.bundle.path(str(Path("onnx") / place["location"])),
            helper.tensor_dtype_to_np_dtype(item.data_type),
            "c",  # torch takes no arrays that cannot be written
            int(place["offset"]),
            tuple(item.dims),
        )
        # torch takes no array of bf16
        return mapped.astype(np.float32) if item.data_type == TensorProto.BFLOAT16 else mapped

    def _other_model(self, what: str) -> SedacError:
        return SedacError(
            f"{self.bundle.directory} holds {what}; name the model that the bundle was built from"
        )


def _by_name(items: list[TensorProto]) -> dict[str, TensorProto]:
    return {item.name: item for item in items}


def _place(item: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in item.external_data}
