"""Tell a model apart from the one that a bundle was built from.

Names and shapes of weights do not: two models may differ in config.json alone.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from sedac_export.bundle.agreement_row import GATES, failures
from sedac_export.bundle.manifest import LayerEngineEntry, Manifest, ModelFacts
from sedac_export.bundle.plan_entries import PortableGraphs
from sedac_export.bundle.portable_runner import PortableRunner
from sedac_export.device_graphs.agreement import compare
from sedac_export.errors import SedacError
from sedac_export.model.skeleton import Skeleton

# the windows that layers see, 0 for all, and their norms' epsilons
Settings = tuple[set[int], set[float]]

# of the epsilon that keeps a length from being 0, which is no model's
_LEAST_EPSILON = 1e-20

# outputs of a layer engine that say something of the layer
_SIGNALS = {"stability", "risk"}


def check_graphs(
    directory: Path, manifest: Manifest, graphs: PortableGraphs, name: Path, model: str
) -> None:
    """Raise SedacError when `graphs`, traced from `model`, are not the bundle's own engines'.

    directory: where they and the engines are. name: what the user calls the bundle.
    """
    reason = _other_settings(directory, manifest, graphs) or _disagreement(
        directory, manifest, graphs
    )
    if reason is not None:
        raise other_model(name, model, reason)


def check_facts(name: Path, facts: ModelFacts, model: str, skeleton: Skeleton) -> None:
    """Raise SedacError when `model` is of another kind or size than the bundle `name`."""
    config = skeleton.config
    for what, made, wanted in (
        ("type", config.model_type, facts.type),
        ("number of layers", len(skeleton.layers), facts.num_layers),
        ("hidden size", config.hidden_size, facts.hidden_size),
        ("vocabulary size", config.vocab_size, facts.vocab_size),
    ):
        if made != wanted:
            raise other_model(name, model, f"its {what} is {made}, the bundle's {wanted}")


def other_model(name: Path, model: str, reason: str) -> SedacError:
    """That `model` is not the one that the bundle `name` was built from."""
    return SedacError(
        f"{model} is not the model that {name} was built from: {reason}; give that one as --model"
    )


def engine_settings(file: Path) -> Settings:
    """What a layer engine's graph says of itself."""
    windows, epsilons = set(), set()
    for node in _layer_nodes(onnx.load(file, load_external_data=False).graph):
        numbers = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "GroupQueryAttention":
            window = numbers.get("local_window_size")
            windows.add(0 if window is None else max(window.i, 0))
        if "epsilon" in numbers and numbers["epsilon"].f > _LEAST_EPSILON:
            epsilons.add(numbers["epsilon"].f)
    return windows, epsilons


def _layer_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes that the residual stream and caches come from.

    A probe's norm has an epsilon of its own, which is none of the model's.
    """
    needed = {output.name for output in graph.output} - _SIGNALS
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            yield node


def other_settings(engine: LayerEngineEntry, own: Settings, held: Settings) -> str | None:
    """How the settings of a model's layers differ from those that `engine` of a bundle has."""
    first, last = engine.first_layer, engine.first_layer + engine.num_layers - 1
    layers = f"layer {first}" if first == last else f"layers {first} to {last}"
    (windows, epsilons), (held_windows, held_epsilons) = own, held
    if windows != held_windows:
        made, wanted = _listed(windows), _listed(held_windows)
        return f"the window of {layers} is {made}, the bundle's {wanted}"
    if epsilons != held_epsilons:
        made, wanted = _listed(epsilons), _listed(held_epsilons)
        return f"the norms' epsilon of {layers} is {made}, the bundle's {wanted}"
    return None


def _other_settings(directory: Path, manifest: Manifest, graphs: PortableGraphs) -> str | None:
    """Where graphs are not made as engines say that they are: few rows might not show it."""
    for engine, graph in zip(manifest.engines.layers, graphs.layers, strict=True):
        windows, epsilons = engine_settings(directory / graph.file)
        windows |= {graphs.masks[mask] for mask in graph.masks}
        held = engine_settings(directory / engine.file)
        reason = other_settings(engine, (windows, epsilons), held)
        if reason is not None:
            return reason
    return None


def _disagreement(directory: Path, manifest: Manifest, graphs: PortableGraphs) -> str | None:
    runner = PortableRunner(directory, manifest.device_precision())
    try:
        rows = compare(directory, manifest, graphs, runner, GATES[runner.computes])
    except Exception as error:  # its caches or contexts have other shapes
        return f"its engines do not run on the bundle's inputs ({' '.join(str(error).split())})"
    return next(iter(failures(rows)), None)


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in sorted(numbers)) or "none"
