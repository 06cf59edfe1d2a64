"""What the manifest says of portable graphs and of the plans built from them."""

from typing import Literal

from pydantic import Field

from sedac_export.bundle.schema import StrictModel


class PortableContext(StrictModel):
    """A context tensor as portable graphs have it; -1 stands for the sequences and tokens."""

    dtype: Literal["float32", "float16", "bfloat16", "int64", "int32", "bool"]
    shape: list[int]


class PortableLayers(StrictModel):
    """A portable graph of consecutive decoder layers, counted from 0, and its mask inputs.

    stability says whether it gives that of its layers.
    """

    file: str
    first_layer: int
    num_layers: int
    masks: list[str]
    stability: bool = True


class PortableGraphs(StrictModel):
    """Graphs in the bundle's precision, in the order of its own engines.

    They are those that TensorRT builds from, or those that ONNX Runtime runs on a GPU.

    contexts are tensors, which the graph contexts_graph gives; it is None where there are none.
    masks gives for each mask input the positions that a token sees through it, 0 for all.
    """

    embed: str
    contexts_graph: str | None = None
    layers: list[PortableLayers]
    key_value: list[str]
    head: str
    contexts: dict[str, PortableContext]
    masks: dict[str, int]

    def files(self) -> list[str]:
        """Every graph, in the order a token passes them, kv graphs before the head."""
        contexts = [] if self.contexts_graph is None else [self.contexts_graph]
        layers = [entry.file for entry in self.layers]
        return [self.embed, *contexts, *layers, *self.key_value, self.head]


class BuildOptions(StrictModel):
    """How plans are built.

    compute_capabilities such as "8.6" are those of the GPUs that run the plans, and TensorRT-RTX's
    alone; empty means all that it builds for. version_compatible and hardware_compatible plans run
    on later versions of TensorRT and on all GPUs from Ampere on.
    """

    max_batch_size: int = 1
    max_prefill_chunk: int = 512
    compute_capabilities: list[str] = Field(default_factory=list)
    version_compatible: bool = False
    hardware_compatible: bool = False


class PlanEntry(StrictModel):
    """One plan. fingerprint is of all that went into it, aliases give each output's input."""

    file: str
    graph: str
    fingerprint: str
    seconds: float
    aliases: dict[str, str]


class PlanSet(StrictModel):
    """A target's plans and what runs them."""

    version: str
    cuda: str
    platform: str
    built_on: str | None
    compute_capabilities: list[str]
    options: BuildOptions
    plans: list[PlanEntry]
