"""Which weights of a model are quantized."""

from collections.abc import Iterator
from dataclasses import dataclass

from sedac_export.errors import SedacError
from sedac_export.graph.quantized_graph import Layout, layouts
from sedac_export.graph.stamp import QuantizedStorage
from sedac_export.graph.trace import TracedGraph
from sedac_export.graph.trace_model import TracedGraphs
from sedac_export.model.quantization import Quantization
from sedac_export.model.skeleton import Skeleton

HEAD = "head"


@dataclass(frozen=True)
class KeptPrecision:
    """What is not quantized: layers, counted from 0, and the head with what is tied to it."""

    layers: frozenset[int] = frozenset()
    head: bool = False

    @classmethod
    def parse(cls, text: str, num_layers: int) -> "KeptPrecision":
        """What --keep-precision says. Raises SedacError for what the model does not have."""
        words = [word.strip() for word in text.split(",") if word.strip()]
        numbers = [word for word in words if word != HEAD]
        wrong = [n for n in numbers if not n.isdecimal() or int(n) >= num_layers]
        if wrong:
            raise SedacError(
                f"--keep-precision {wrong[0]} is neither {HEAD} nor one of this model's layers, 0"
                f" to {num_layers - 1}"
            )
        return cls(frozenset(map(int, numbers)), HEAD in words)


def weight_sources(skeleton: Skeleton, graph: TracedGraph, prefix: str) -> dict[str, str]:
    """Where the checkpoint holds each weight of `graph`, traced of what is at `prefix`."""
    names = skeleton.sources.names
    return {
        initializer: names[prefix + parameter.split(".", 1)[1]]
        for initializer, parameter in graph.weights.items()
    }


def choose_quantized(
    skeleton: Skeleton, graphs: TracedGraphs, quantization: Quantization, kept: KeptPrecision
) -> QuantizedStorage:
    """Quantize every weight that all graphs multiply with, or embed tokens by, but those `kept`.

    Raises SedacError when the rows of an embedding are no whole blocks.
    """
    found: dict[str, set[Layout | None]] = {}
    held: set[str] = set()
    known = {id(graph): layouts(graph) for graph in _all_graphs(graphs)}
    for graph, prefix, is_kept in _uses(skeleton, graphs, kept):
        for initializer, source in weight_sources(skeleton, graph, prefix).items():
            found.setdefault(source, set()).add(known[id(graph)][initializer])
            if is_kept:
                held.add(source)
    chosen = {
        source: layout
        for source, (layout, *others) in ((s, tuple(ls)) for s, ls in found.items())
        if layout is not None and not others and source not in held
    }
    _check_embedding(skeleton, graphs, chosen, quantization)
    return QuantizedStorage(quantization, chosen)


def _uses(
    skeleton: Skeleton, graphs: TracedGraphs, kept: KeptPrecision
) -> Iterator[tuple[TracedGraph, str, bool]]:
    """Every graph that is stamped with where its weights are below, and whether they are kept."""
    yield graphs.embed, "", False
    yield graphs.head, "", kept.head
    for index, kind in enumerate(graphs.kinds):
        for of_kind in (graphs.layers, graphs.key_value, graphs.attention):
            if of_kind:
                prefix = f"{skeleton.layers_path}.{index}."
                yield of_kind[kind], prefix, index in kept.layers


def _all_graphs(graphs: TracedGraphs) -> list[TracedGraph]:
    return [
        graphs.embed,
        graphs.head,
        *graphs.layers,
        *graphs.key_value,
        *graphs.attention,
    ]


def _check_embedding(
    skeleton: Skeleton,
    graphs: TracedGraphs,
    chosen: dict[str, Layout],
    quantization: Quantization,
) -> None:
    sources = weight_sources(skeleton, graphs.embed, "")
    for initializer in graphs.embed.model.graph.initializer:
        if sources.get(initializer.name) not in chosen:
            continue
        size = initializer.dims[-1]
        if size % quantization.block_size:
            raise SedacError(
                f"the embedding's rows of {size} numbers are no whole blocks of"
                f" {quantization.block_size}; choose a --block-size that divides {size}"
            )
