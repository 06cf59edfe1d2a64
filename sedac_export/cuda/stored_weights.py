"""Read the weights that a bundle's engines share, by their names in the model."""

from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto, helper

from sedac_export.arrays import Array
from sedac_export.bundle import Bundle
from sedac_export.cuda.layer_weights import WeightReader
from sedac_export.errors import SedacError


class StoredWeights:
    """The weights of `bundle`, mapped from its files."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        engines = bundle.manifest.engines
        self.embed, self.head = self._weights(engines.embed), self._weights(engines.head)
        self.monolith = {item.name: item for item in self._weights(engines.monolith.file)}

    def reader(self, layer: int) -> WeightReader:
        """Gives weights of `layer` by their names below it."""
        prefix = self._prefix(layer)

        def read(name: str) -> torch.Tensor:
            item = self.monolith.get(f"{prefix}{name}")
            if item is None:
                raise self._other_model(f"no weight {name} of layer {layer}")
            return torch.from_numpy(self._array(item))

        return read

    def of_layer(self, layer: int) -> list[Array]:
        """All weights of `layer`."""
        prefix = self._prefix(layer)
        items = self.monolith.items()
        return [self._array(item) for name, item in items if name.startswith(prefix)]

    def embedding(self) -> Array:
        """The embedding's rows, [vocabulary, hidden]."""
        return self._array(self._of_rank(self.embed, 2))

    def projection(self) -> Array:
        """The matrix to logits, [vocabulary, hidden]."""
        return self._array(self._of_rank(self.head, 2))

    def final_norm(self) -> Array:
        """The weight of the norm before the projection, [hidden]."""
        return self._array(self._of_rank(self.head, 1))

    def tied(self) -> bool:
        """Whether embedding and projection are one matrix."""
        embed, head = (_place(self._of_rank(items, 2)) for items in (self.embed, self.head))
        return embed == head

    def _prefix(self, layer: int) -> str:
        # a monolith of one layer is that layer's graph, its names unchanged
        return f"layer_{layer}.layer." if self.bundle.manifest.model.num_layers > 1 else "layer."

    def _weights(self, file: str) -> list[TensorProto]:
        return [item for item in self.bundle.graph(file).graph.initializer if item.external_data]

    def _of_rank(self, items: list[TensorProto], rank: int) -> TensorProto:
        found = [item for item in items if len(item.dims) == rank]
        if len(found) != 1:
            raise self._other_model(
                f"{len(found)} weights of rank {rank} before or after its layers"
            )
        return found[0]

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


def _place(item: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in item.external_data}
