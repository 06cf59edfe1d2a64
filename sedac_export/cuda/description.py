"""Describe a model as the kernel computes it, and accept that only where it gives its numbers."""

import contextlib
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from sedac_export.bundle.cuda_entry import ChainLayer, ChainOptions, ChainShape
from sedac_export.cuda import recomputation
from sedac_export.cuda.identification import (
    IdentifiedLayer,
    NoChainError,
    find_norm,
    identify,
    is_same,
)
from sedac_export.cuda.layer_weights import MATRICES, LayerWeights
from sedac_export.cuda.observation import EndsObservation, LayerObservation, Tables, observing
from sedac_export.errors import SedacError
from sedac_export.graph.operators import RmsNorm
from sedac_export.model.skeleton import Skeleton

# the largest relative difference of what a layer adds to its input, in float64
TOLERANCE = 1e-9

_MAX_GROUP = 8
HEAD_SIZES = (16, 32, 48, 64, 96, 128)
# those whose norms are sums over a power of two of lanes
_NORMED_HEAD_SIZES = (16, 32, 64, 128)

_T = TypeVar("_T", bound=Hashable)


@dataclass(frozen=True)
class ChainDescription:
    """All that the kernel must know of a model but its weights.

    weights: for each layer which of its modules does what. tables: the observed rotary tables, by
    the index that layers name them; None where nothing is rotated. final_norm_offset: what is added
    to the final norm's weight.
    """

    shape: ChainShape
    options: ChainOptions
    layers: list[ChainLayer]
    weights: list[LayerWeights]
    tables: list[Tables | None]
    final_norm_offset: float

    def vectors(self) -> list[str]:
        """Names of the norms and biases that some layer has, and so every layer in the file."""
        return sorted({name for weights in self.weights for name in weights.vectors()})


def describe(skeleton: Skeleton) -> ChainDescription:
    """The description of `skeleton`, which gives the numbers of every kind of its layers.

    Each kind of layer runs once in float64, with random weights, and is computed again by the
    description alone; so are embedding and head. Raises NoChainError with the reason when the
    kernel cannot run the model.
    """
    with _unexpected_structure():
        return _described(skeleton)


def _described(skeleton: Skeleton) -> ChainDescription:
    with observing(skeleton) as observer:
        kinds = observer.kinds()
        seen = {index: observer.layer(index) for index in dict.fromkeys(kinds)}
        ends = observer.ends()
    found = {index: identify(observation) for index, observation in seen.items()}
    description = _describe(skeleton, [found[kind] for kind in kinds], ends)
    _check_limits(description.shape, "query_norm" in description.vectors())
    _check_norms(description.vectors())
    for index, observation in seen.items():
        check_layer(description, index, observation)
    check_ends(description, ends)
    return description


@contextlib.contextmanager
def _unexpected_structure() -> Iterator[None]:
    """Whatever a model of another structure trips over, as the reason why it is refused."""
    try:
        yield
    except (SedacError, OSError):
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise NoChainError(
            f"its layers cannot be observed ({type(error).__name__}: {reason})"
        ) from error


def check_layer(description: ChainDescription, index: int, seen: LayerObservation) -> None:
    """Raise NoChainError when `description` gives other numbers than layer `index` was seen to."""
    weights, layer = description.weights[index], description.layers[index]
    read = seen.weights.__getitem__
    matrices = {name: weights.matrix(name, read) for name in MATRICES}
    vectors = {name: weights.vector(name, read) for name in weights.vectors()}
    half = description.shape.rotary_size // 2
    got = recomputation.layer(
        seen.entering,
        matrices | vectors,
        description.shape,
        description.options,
        layer.window,
        description.tables[layer.rotary] or still(len(seen.entering), half),
    )
    error = float((got - seen.leaving).norm() / (seen.leaving - seen.entering).norm())
    if not error <= TOLERANCE:
        raise NoChainError(f"its layer {index} differs from the kernel's by {error:.0e}")


def check_ends(description: ChainDescription, seen: EndsObservation) -> None:
    """Raise NoChainError when `description` gives other numbers than embedding and head did."""
    options = description.options
    if not is_same(seen.embedding * options.embedding_scale, seen.embedded):
        raise NoChainError("its embedding is more than a row of a table, times a number")
    norm, projection = seen.modules
    weight = norm.weight + description.final_norm_offset
    logits = recomputation.head(seen.entering, weight, projection.weight, options)
    if not is_same(logits, seen.logits):
        raise NoChainError("its head is more than an RMS norm and a projection")


def still(positions: int, half: int) -> Tables:
    """Rotary tables [positions, half] that rotate nothing."""
    return torch.ones(positions, half), torch.zeros(positions, half)


def _describe(
    skeleton: Skeleton, found: list[IdentifiedLayer], ends: EndsObservation
) -> ChainDescription:
    tables: list[Tables | None] = []
    for layer in found:
        if not any(_are_same(layer.tables, known) for known in tables):
            tables.append(layer.tables)
    sizes = {2 * known[0].shape[-1] for known in tables if known is not None}
    _shared("norms", [tuple(sorted(layer.weights.norms)) for layer in found])
    rotary_size = _shared("rotary sizes", sizes or {found[0].attention.query.shape[-1]})
    norm = _final_norm(ends)
    return ChainDescription(
        shape=_shared("sizes", [_shape(skeleton, layer, rotary_size) for layer in found]),
        options=ChainOptions(
            activation=_shared("activations", [layer.activation for layer in found]),
            norm_epsilon=_shared(
                "norms' epsilons", {norm.epsilon, *(e for layer in found for e in layer.epsilons)}
            ),
            attention_scale=_shared("attention scales", [f.attention.scale for f in found]),
            attention_softcap=_shared("soft caps", [f.attention.softcap for f in found]),
            logits_softcap=getattr(skeleton.config, "final_logit_softcapping", None) or 0.0,
            embedding_scale=_embedding_scale(ends),
        ),
        layers=[
            ChainLayer(
                window=layer.attention.window,
                rotary=next(i for i, known in enumerate(tables) if _are_same(layer.tables, known)),
            )
            for layer in found
        ],
        weights=[layer.weights for layer in found],
        tables=tables,
        final_norm_offset=norm.offset,
    )


def _are_same(tables: Tables | None, others: Tables | None) -> bool:
    if tables is None or others is None:
        return tables is others
    return all(torch.equal(x, y) for x, y in zip(tables, others, strict=True))


def _shared(what: str, values: Iterable[_T]) -> _T:
    """The value that all layers share. Raises NoChainError when they do not."""
    first, *others = dict.fromkeys(values)
    if others:
        raise NoChainError(f"its layers differ in their {what} ({first}, {others[0]})")
    return first


def _shape(skeleton: Skeleton, layer: IdentifiedLayer, rotary_size: int) -> ChainShape:
    query, key, gate = layer.attention.query, layer.attention.key, layer.weights.gate
    return ChainShape(
        hidden=skeleton.config.hidden_size,
        heads=query.shape[0],
        key_value_heads=key.shape[0],
        head_size=query.shape[-1],
        rotary_size=rotary_size,
        intermediate=gate.stop - gate.start,
        layers=len(skeleton.layers),
        vocabulary=skeleton.config.vocab_size,
    )


def _final_norm(ends: EndsObservation) -> RmsNorm:
    """The norm before the projection to logits. Raises NoChainError when there is more."""
    modules = [call.module for call in ends.modules]
    if len(modules) != 2 or not isinstance(modules[1], nn.Linear) or modules[1].bias is not None:
        names = ", ".join(type(module).__name__ for module in modules)
        raise NoChainError(f"its head is more than an RMS norm and a projection ({names})")
    return find_norm(ends.modules[0])


def _embedding_scale(ends: EndsObservation) -> float:
    """What the embedding's rows are multiplied with."""
    largest = ends.embedding.abs().argmax()
    if ends.embedding.shape != ends.embedded.shape:
        raise NoChainError("its embedding has another size than its layers")
    ratio = ends.embedded.flatten()[largest] / ends.embedding.flatten()[largest]
    return float(ratio)


def _check_norms(vectors: list[str]) -> None:
    """Raise NoChainError where the kernel does not compute the layers' norms."""
    if not {"attention_norm", "mlp_norm"} <= set(vectors):
        raise NoChainError("its layers have no norms before attention and MLP")
    if ("attention_post_norm" in vectors) != ("mlp_post_norm" in vectors):
        raise NoChainError("its layers have a norm after attention or after the MLP alone")


def _check_limits(shape: ChainShape, has_head_norms: bool) -> None:
    """Raise NoChainError when the kernel is not made for `shape`: see its shape.cuh."""
    attended = shape.heads * shape.head_size
    products = (shape.heads + 2 * shape.key_value_heads) * shape.head_size
    group, rest = divmod(shape.heads, shape.key_value_heads)
    sizes = _NORMED_HEAD_SIZES if has_head_norms else HEAD_SIZES
    known = ", ".join(map(str, sizes))
    limits = [
        (shape.hidden % 32, f"its hidden size {shape.hidden} is no multiple of 32"),
        (attended % 32, f"its heads' {attended} numbers are no multiple of 32"),
        (shape.intermediate % 32, f"its MLP's size {shape.intermediate} is no multiple of 32"),
        (shape.intermediate < 64, f"its MLP's size {shape.intermediate} is below 64"),
        (products % 16, f"its queries, keys and values are {products} numbers, no multiple of 16"),
        (rest, f"{shape.heads} heads are no multiple of {shape.key_value_heads}"),
        (group > _MAX_GROUP, f"{group} heads share keys, and the kernel takes {_MAX_GROUP}"),
        (shape.head_size not in sizes, f"its heads are of {shape.head_size} and not of {known}"),
        (shape.rotary_size % 4, f"its rotary size {shape.rotary_size} is no multiple of 4"),
    ]
    reason = next((reason for broken, reason in limits if broken), None)
    if reason is not None:
        raise NoChainError(reason)
