"""The modules that are traced: embed, layer, kv and head engines of a skeleton."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sedac_export.errors import SedacError
from sedac_export.graph.kernels import Heads
from sedac_export.graph.operators import HALF, AttentionRouter, group_query_attention, scatter
from sedac_export.model.decoder import cache_argument
from sedac_export.model.skeleton import Skeleton

# what a context tensor may hold
CONTEXT_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.bool,
)


@dataclass(frozen=True)
class Context:
    """A tensor that the model computes once per step and hands to its layers, such as cos.

    Rotary tables repeat their first half; only that half travels.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    halved: bool
    used: bool = True

    def check(self, batch: int) -> None:
        """Raise SedacError when the runtime could not carry this tensor to the layers."""
        in_rows = len(self.shape) > 1 and self.shape[0] in (1, batch)
        if not in_rows or self.dtype not in CONTEXT_DTYPES:
            raise SedacError(
                f"the layers read a {self.dtype} tensor of shape {list(self.shape)} that is not"
                " one row per token; this model is not supported"
            )


@dataclass
class LayerCall:
    """How the model calls one layer: its arguments, tensors replaced by context indices."""

    arguments: inspect.BoundArguments
    uses: list[int | None]

    def fill(self, x: Tensor, contexts: list[Tensor], cache: Any) -> inspect.BoundArguments:
        """The call's arguments with `x` as the hidden state and `cache` as the cache."""
        leaves, spec = pytree.tree_flatten(_as_dict(self.arguments))
        filled = [
            leaf if use is None else contexts[use]
            for leaf, use in zip(leaves, self.uses, strict=True)
        ]
        bound = inspect.BoundArguments(
            self.arguments.signature, pytree.tree_unflatten(filled, spec)
        )
        bound.arguments[next(iter(bound.arguments))] = x
        bound.arguments[cache_argument(bound.signature.parameters)] = cache
        return bound


@dataclass
class LayerInterface:
    """What was learned from running the model once over stand-ins for its layers.

    batch is the number of sequences that it ran; the traced graphs take any number if it is over 1.
    """

    batch: int = 1
    contexts: list[Context] = field(default_factory=list)
    calls: list[LayerCall] = field(default_factory=list)
    heads: list[Heads] = field(default_factory=list)
    returns_tuple: bool = False


class EmbedModule(nn.Module):
    """input_ids, position_ids [batch, tokens] int64 -> x [batch, tokens, hidden] and contexts."""

    def __init__(self, skeleton: Skeleton, interface: LayerInterface) -> None:
        super().__init__()
        self.model = skeleton.model
        self.skeleton, self.interface = skeleton, interface

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        recorder = LayerRecorder(self.interface.returns_tuple)
        with replaced_layers(self.skeleton, recorder):
            run_model(self.model, input_ids, position_ids)
        pairs = zip(recorder.distinct_tensors(), self.interface.contexts, strict=True)
        return recorder.hidden, *(
            tensor[..., : tensor.shape[-1] // 2] if context.halved else tensor.clone()
            for tensor, context in pairs
            if context.used
        )


class HeadModule(nn.Module):
    """x [batch, tokens, hidden] -> logits [batch, tokens, vocabulary], final norm included."""

    def __init__(self, skeleton: Skeleton, interface: LayerInterface) -> None:
        super().__init__()
        self.model = skeleton.model
        self.skeleton, self.interface = skeleton, interface

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.full(x.shape[:2], 2)
        positions = torch.arange(x.shape[1])[None]
        with replaced_layers(self.skeleton, LayerRecorder(self.interface.returns_tuple, x)):
            logits: Tensor = run_model(self.model, tokens, positions).logits
        return logits


class SingleLayerModule(nn.Module):
    """What is traced of the layer `index` and of how the model calls it."""

    def __init__(
        self, skeleton: Skeleton, interface: LayerInterface, index: int, router: AttentionRouter
    ) -> None:
        super().__init__()
        self.layer = skeleton.layers[index]
        self.interface, self.call, self.router = interface, interface.calls[index], router


class LayerModule(SingleLayerModule):
    """One decoder layer with its cache and stability output.

    x [batch, tokens, hidden], contexts, seqlens_k int32 [batch], total_sequence_length int32
    scalar, past_key, past_value [batch, heads, cache length, head size] -> y like x, present_key,
    present_value like past, stability fp32 [batch, tokens, 1].
    """

    def forward(
        self,
        x: Tensor,
        contexts: list[Tensor],
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        past_key_0: Tensor,
        past_value_0: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cache = _GroupQueryCache((past_key_0, past_value_0), (seqlens_k, total_sequence_length))
        y = run_layer(self.layer, self.call, x, whole(self.interface, contexts), cache, self.router)
        return y, *cache.present, stability(x, y)


class KeyValueModule(SingleLayerModule):
    """The part of a layer that fills its cache: norm, key and value projection, rotary.

    x [batch, tokens, hidden], contexts, write_index int64 [batch], past_key, past_value ->
    present_key, present_value.
    """

    def forward(
        self,
        x: Tensor,
        contexts: list[Tensor],
        write_index: Tensor,
        past_key_0: Tensor,
        past_value_0: Tensor,
    ) -> tuple[Tensor, Tensor]:
        cache = RecordingCache()
        run_layer(self.layer, self.call, x, whole(self.interface, contexts), cache, self.router)
        present_key = scatter(past_key_0, cache.key, write_index)
        return present_key, scatter(past_value_0, cache.value, write_index)


def stability(x: Tensor, y: Tensor) -> Tensor:
    """(cos(x, y) + 1) / 2 of two residual streams [..., hidden], in fp32 [..., 1].

    The sums are written out: cosine_similarity exports operators that TensorRT does not parse.
    """
    before, after = x.float(), y.float()
    product = (before * after).sum(-1, keepdim=True)
    norms = (before * before).sum(-1, keepdim=True) * (after * after).sum(-1, keepdim=True)
    return product * torch.rsqrt(norms) * 0.5 + 0.5


def run_layer(
    layer: nn.Module,
    call: LayerCall,
    x: Tensor,
    contexts: list[Tensor],
    cache: Any,
    router: AttentionRouter,
) -> Tensor:
    """The residual stream after `layer`, called as the model calls it."""
    router.cache = cache
    bound = call.fill(x, contexts, cache)
    output = layer(*bound.args, **bound.kwargs)
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def learn_interface(skeleton: Skeleton, router: AttentionRouter, batch: int = 1) -> LayerInterface:
    """Run `batch` sequences with recorders for layers, then each layer once for its heads.

    The weights may be stand-ins: only structure and positions are looked at.
    """
    layers = list(skeleton.layers)
    # far from zero, near which a table may repeat its half by accident, and without gaps,
    # which transformers takes for the start of another sequence
    recorder = record_calls(skeleton, torch.arange(5, 9).repeat(batch, 1))
    tensors = recorder.distinct_tensors()
    interface = LayerInterface(
        batch, contexts=[_context(i, tensor) for i, tensor in enumerate(tensors)]
    )
    for index, layer in enumerate(layers):
        bound = inspect.signature(layer.forward).bind(
            *recorder.args[index], **recorder.kwargs[index]
        )
        leaves = pytree.tree_leaves(_as_dict(bound))
        interface.calls.append(LayerCall(bound, [_index_of(leaf, tensors) for leaf in leaves]))
        cache = RecordingCache()
        router.cache = cache
        filled = interface.calls[index].fill(recorder.hidden, tensors, cache)
        with torch.no_grad():
            output = layer(*filled.args, **filled.kwargs)
        interface.returns_tuple = isinstance(output, tuple)
        interface.heads.append(cache.heads(layer))
    return interface


def record_calls(skeleton: Skeleton, positions: Tensor) -> "LayerRecorder":
    """How the model calls its layers for tokens at `positions`, int64 [batch, tokens]."""
    try:
        return _record(skeleton, positions, returns_tuple=False)
    except (RuntimeError, IndexError, ValueError):
        # the model took the first sequence for the first of a layer's results
        return _record(skeleton, positions, returns_tuple=True)


def _record(skeleton: Skeleton, positions: Tensor, returns_tuple: bool) -> "LayerRecorder":
    """The calls, if layers return a tuple or not."""
    recorder = LayerRecorder(returns_tuple)
    with replaced_layers(skeleton, recorder), torch.no_grad():
        run_model(skeleton.model, positions + 2, positions)
    return recorder


class RecordingCache:
    """Keeps this step's keys and values; attention over them is left out."""

    key: Tensor
    value: Tensor
    attended: Heads

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.key, self.value = key, value
        return key, value

    def attend(self, query: Tensor, **settings: Any) -> Tensor:
        self.attended = Heads(
            count=self.key.shape[1],
            size=self.key.shape[3],
            queries=query.shape[1],
            windowed=settings["window"] > 0,
            capped=settings["softcap"] > 0,
        )
        return query.transpose(1, 2)

    def heads(self, layer: nn.Module) -> Heads:
        if not hasattr(self, "key"):
            raise SedacError(
                f"{type(layer).__name__} never updates a key-value cache; only models whose every"
                " layer attends are supported"
            )
        if not hasattr(self, "attended"):
            raise SedacError(
                f"{type(layer).__name__} never calls transformers' attention interface; this model"
                " is not supported"
            )
        return self.attended


class _GroupQueryCache(RecordingCache):
    present: tuple[Tensor, Tensor]

    def __init__(self, past: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor]) -> None:
        self.past, self.lengths = past, lengths

    def attend(self, query: Tensor, **settings: Any) -> Tensor:
        output, *present = group_query_attention(
            query, self.key, self.value, self.past, self.lengths, **settings
        )
        self.present = (present[0], present[1])
        return output


class LayerRecorder(nn.Module):
    """Stands for every layer: records the call and passes the hidden state on.

    Gives `output` instead, where one is set.
    """

    def __init__(self, returns_tuple: bool, output: Tensor | None = None) -> None:
        super().__init__()
        self.returns_tuple, self.output = returns_tuple, output
        self.args: list[tuple[Any, ...]] = []
        self.kwargs: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        """Plain attributes that a model reads off its layers, such as the attention type."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["originals"][len(self.args)], name)

    @property
    def hidden(self) -> Tensor:
        """The first layer's input."""
        args, kwargs = self.args[0], self.kwargs[0]
        first: Tensor = args[0] if args else kwargs["hidden_states"]
        return first

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.args.append(args)
        self.kwargs.append(kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        output = hidden if self.output is None else self.output
        return (output,) if self.returns_tuple else output

    def distinct_tensors(self) -> list[Tensor]:
        """Every tensor argument of any layer but the hidden state, once each, in call order."""
        found: list[Tensor] = []
        for args, kwargs in zip(self.args, self.kwargs, strict=True):
            rest = (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})
            for leaf in pytree.tree_leaves(rest):
                if isinstance(leaf, Tensor) and _index_of(leaf, found) is None:
                    found.append(leaf)
        return found


@contextlib.contextmanager
def replaced_layers(skeleton: Skeleton, recorder: LayerRecorder) -> Iterator[None]:
    """Within this context `recorder` stands for every layer of the model."""
    layers = skeleton.layers
    originals = list(layers)
    recorder.__dict__["originals"] = originals
    for index in range(len(originals)):
        layers._modules[str(index)] = recorder
    try:
        yield
    finally:
        for index, layer in enumerate(originals):
            layers._modules[str(index)] = layer


def run_model(model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Any:
    """What `model` gives for tokens and positions, int64 [batch, tokens] each.

    Raises SedacError when it takes no positions.
    """
    try:
        return model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    except TypeError as error:
        if "position_ids" in str(error):
            raise SedacError(
                f"{type(model).__name__} takes no position_ids (its positions live inside"
                " attention); this model is not supported"
            ) from error
        raise


def _context(index: int, tensor: Tensor) -> Context:
    size = tensor.shape[-1]
    first, second = tensor[..., : size // 2], tensor[..., size // 2 :]
    halved = tensor.is_floating_point() and size % 2 == 0 and torch.equal(first, second)
    shape = (*tensor.shape[:-1], size // 2) if halved else tuple(tensor.shape)
    return Context(f"context_{index}", shape, tensor.dtype, halved)


def whole(interface: LayerInterface, contexts: list[Tensor]) -> list[Tensor]:
    """Contexts as the layer expects them; a repeated table remembers its half for the operator."""
    whole = []
    for tensor, context in zip(contexts, interface.contexts, strict=True):
        if context.halved:
            table = torch.cat((tensor, tensor), dim=-1)
            setattr(table, HALF, tensor)
            whole.append(table)
        else:
            whole.append(tensor)
    return whole


def _index_of(leaf: Any, tensors: list[Tensor]) -> int | None:
    return next((i for i, tensor in enumerate(tensors) if tensor is leaf), None)


def _as_dict(bound: inspect.BoundArguments) -> dict[str, Any]:
    return dict(bound.arguments)
