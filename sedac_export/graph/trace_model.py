"""Trace every graph that a bundle needs, the layers' graphs once for each kind of layer."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from sedac_export.console import StageProgress
from sedac_export.errors import SedacError
from sedac_export.graph.kernels import refusal
from sedac_export.graph.masks import known_masks
from sedac_export.graph.modules import LayerInterface, learn_interface
from sedac_export.graph.operators import ATTENTION_NAME, AttentionRouter, fused_operators
from sedac_export.graph.split import split_embed
from sedac_export.graph.trace import TracedGraph, Tracer
from sedac_export.model.skeleton import Skeleton, kind_of, stand_in_weights


@dataclass(frozen=True)
class TracedGraphs:
    """The traced graphs: layers and kv graphs by kind, and each layer's kind.

    attention is empty where the form has no soft exits. contexts is None where the layers take the
    hidden states alone.
    """

    interface: LayerInterface
    embed: TracedGraph
    contexts: TracedGraph | None
    head: TracedGraph
    layers: list[TracedGraph]
    key_value: list[TracedGraph]
    attention: list[TracedGraph]
    kinds: list[int]


def check_attention(skeleton: Skeleton, positions: int) -> None:
    """Raise SedacError when the engines cannot attend as the layers do, in texts of `positions`.

    Nothing is traced: layers run once, with masks that know what they mean.
    """
    with (
        _tracing_errors(skeleton),
        stand_in_weights(skeleton.model, torch.float32),
        known_masks(ATTENTION_NAME, positions) as masks,
    ):
        router = AttentionRouter(masks)
        with fused_operators(skeleton.model, router), torch.no_grad():
            interface = learn_interface(skeleton, router)
    for heads in dict.fromkeys(interface.heads):
        reason = refusal(heads)
        if reason is not None:
            raise SedacError(
                f"{skeleton.directory}: ONNX Runtime's attention cannot take {heads.queries} query"
                f" and {heads.count} key-value heads of {heads.size} numbers ({reason}); export a"
                " model with heads that it takes, such as of 64 or 128"
            )


def trace_graphs(
    skeleton: Skeleton,
    progress: StageProgress,
    tracer_type: type[Tracer] = Tracer,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
) -> TracedGraphs:
    """Trace each kind of engine once, with stand-ins of `dtype` for weights.

    With a batch over 1 the graphs take any number of sequences. Raises SedacError when the model
    cannot be split.
    """
    router = AttentionRouter()
    with (
        _tracing_errors(skeleton),
        stand_in_weights(skeleton.model, dtype),
        fused_operators(skeleton.model, router),
    ):
        interface = learn_interface(skeleton, router, batch)
        tracer = tracer_type(skeleton, interface, router, dtype)
        kinds, first = _kinds(skeleton, interface)
        with_attention = first if tracer.soft_exits else []
        count = _Counter(progress, steps=2 * len(first) + len(with_attention) + 2)
        layers = [count(tracer.layer(index)) for index in first]
        key_value = [count(tracer.key_value(index)) for index in first]
        attention = [count(tracer.attention(index)) for index in with_attention]
        _mark_used_contexts(interface, [*layers, *key_value])
        embed, contexts = _split(count(tracer.embed()))
        head = count(tracer.head())
    return TracedGraphs(interface, embed, contexts, head, layers, key_value, attention, kinds)


def _split(whole: TracedGraph) -> tuple[TracedGraph, TracedGraph | None]:
    """The graphs of embed and contexts."""
    embed, contexts = split_embed(whole.model)
    return whole.of_part(embed), None if contexts is None else whole.of_part(contexts)


class _Counter:
    """Reports each graph as it comes."""

    def __init__(self, progress: StageProgress, steps: int) -> None:
        self.progress, self.steps, self.done = progress, steps, 0
        progress("trace", 0, steps)

    def __call__(self, graph: TracedGraph) -> TracedGraph:
        self.done += 1
        self.progress("trace", self.done, self.steps)
        return graph


def _kinds(skeleton: Skeleton, interface: LayerInterface) -> tuple[list[int], list[int]]:
    """Each layer's kind, numbered from 0, and the first layer of each kind."""
    signatures = [
        (kind_of(layer), heads)
        for layer, heads in zip(skeleton.layers, interface.heads, strict=True)
    ]
    first: list[int] = []
    kinds = []
    for index, signature in enumerate(signatures):
        known = [kind for kind, layer in enumerate(first) if signatures[layer] == signature]
        kinds.append(known[0] if known else len(first))
        if not known:
            first.append(index)
    return kinds, first


def _mark_used_contexts(interface: LayerInterface, graphs: list[TracedGraph]) -> None:
    used = {name for graph in graphs for name in graph.inputs()}
    interface.contexts = [replace(c, used=c.name in used) for c in interface.contexts]
    for context in interface.contexts:
        if context.used:
            context.check(interface.batch)


@contextlib.contextmanager
def _tracing_errors(skeleton: Skeleton) -> Iterator[None]:
    """Raise what an unsupported architecture fails on as a SedacError."""
    try:
        yield
    except (SedacError, OSError):
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next(iter(str(cause).splitlines()), "")
        raise SedacError(
            f"{skeleton.config.model_type} models are not supported: their layers cannot be taken"
            f" apart ({type(cause).__name__}: {reason})"
        ) from error
