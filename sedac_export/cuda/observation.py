"""Run single layers of a model in float64, with random weights, and watch what they compute."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from sedac_export.graph.modules import LayerRecorder, record_calls, replaced_layers, run_model
from sedac_export.graph.operators import ATTENTION_NAME, routed_attention
from sedac_export.model.skeleton import Skeleton, kind_of, stand_in_weights
from sedac_export.model.weights import weights_of

# positions of a prompt that is longer than the windows of small models
TOKENS, FIRST_POSITION = 24, 5
# rows of the vocabulary that stand for all: the head computes each alike
_HEAD_ROWS = 256
# small enough that a norm's epsilon shows in its result
_HIDDEN_SPREAD = 0.1

Tables = tuple[Tensor, Tensor]


class InDouble(TorchFunctionMode):
    """Computes in float64 what modules ask to have computed in float32."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """torch's interface of a mode."""
        if function is Tensor.float:
            function = Tensor.double
        args, kwargs = pytree.tree_map(_widened, (args, kwargs or {}))
        return function(*args, **kwargs)


@dataclass(frozen=True)
class ModuleCall:
    """A module that ran: its name below the layer, the weight that it had, input and output.

    input and output are those of the only sequence, [tokens, ...].
    """

    name: str
    module: nn.Module
    weight: Tensor
    input: Tensor
    output: Tensor


@dataclass(frozen=True)
class AttentionCall:
    """A call of attention: query, key and value [heads, tokens, head size], after rotation.

    before is the number of modules that had run by then.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    window: int
    softcap: float
    before: int


@dataclass
class LayerObservation:
    """What one layer did to a prompt of TOKENS positions from FIRST_POSITION on.

    entering, leaving: the residual stream [tokens, hidden] before and after it. tables: the cosines
    and sines [tokens, half the rotary size] that the model hands to it, where it does. weights: the
    layer's random weights by name.
    """

    entering: Tensor
    tables: Tables | None
    weights: dict[str, Tensor]
    modules: list[ModuleCall] = field(default_factory=list)
    attention: list[AttentionCall] = field(default_factory=list)
    leaving: Tensor = field(init=False)


@dataclass(frozen=True)
class EndsObservation:
    """What embedding and head did.

    embedded: the residual stream [tokens, hidden] that the rows `embedding` became. modules: those
    that ran between the stream `entering` and the logits [tokens, rows].
    """

    embedding: Tensor
    embedded: Tensor
    entering: Tensor
    modules: list[ModuleCall]
    logits: Tensor


class Observer:
    """Runs parts of `skeleton` in float64. Use inside `observing`.

    recorder: how the model calls its layers. attention: what computes attention.
    """

    def __init__(
        self, skeleton: Skeleton, recorder: LayerRecorder, attention: "_EagerAttention"
    ) -> None:
        self.skeleton, self.recorder, self.attention = skeleton, recorder, attention

    def kinds(self) -> list[int]:
        """For each layer the first layer that is like it and is called like it."""
        first: list[tuple[Any, int]] = []
        kinds = []
        for index, layer in enumerate(self.skeleton.layers):
            tensors = [id(leaf) for leaf in self._leaves(index)[1:]]
            signature = (kind_of(layer), tensors)
            known = next((i for other, i in first if other == signature), None)
            if known is None:
                first.append((signature, index))
            kinds.append(index if known is None else known)
        return kinds

    def layer(self, index: int) -> LayerObservation:
        """Run layer `index` on a random residual stream."""
        layer, recorder = self.skeleton.layers[index], self.recorder
        generator = torch.Generator().manual_seed(0)
        hidden = _random(recorder.hidden.shape, generator) * _HIDDEN_SPREAD
        args, kwargs = recorder.args[index], dict(recorder.kwargs[index])
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs["hidden_states"] = hidden
        with _random_weights(layer, generator) as weights:
            # the model may write into its input
            seen = LayerObservation(hidden[0].clone(), self._tables(index), weights)
            self.attention.seen = seen
            with _watched(layer, seen.modules):
                output = layer(*args, **kwargs)
        seen.leaving = (output[0] if isinstance(output, tuple) else output)[0]
        return seen

    def ends(self) -> EndsObservation:
        """Run the model without its layers, the head on a random residual stream."""
        model, recorder = self.skeleton.model, self.recorder
        generator = torch.Generator().manual_seed(0)
        entering = _random(recorder.hidden.shape, generator) * _HIDDEN_SPREAD
        positions = _positions()
        embedding = model.get_input_embeddings().get_parameter("weight")[positions[0] + 2]
        stand_in = LayerRecorder(recorder.returns_tuple, entering)
        modules: list[ModuleCall] = []
        with (
            replaced_layers(self.skeleton, stand_in),
            _few_rows(self._head()),
            _watched(model, modules),
        ):
            logits = run_model(model, positions + 2, positions).logits[0]
        first = next(
            (i for i, call in enumerate(modules) if torch.equal(call.input, entering[0])), 0
        )
        return EndsObservation(embedding, recorder.hidden[0], entering[0], modules[first:], logits)

    def _head(self) -> nn.Module:
        head: nn.Module = self.skeleton.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return head

    def _leaves(self, index: int) -> list[Tensor]:
        """Every tensor that layer `index` is given, the residual stream first."""
        kwargs = dict(self.recorder.kwargs[index])
        hidden = kwargs.pop("hidden_states", None)
        leaves = pytree.tree_leaves((hidden, self.recorder.args[index], kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _tables(self, index: int) -> Tables | None:
        """The rotary tables among what layer `index` is given: two that repeat their half."""
        found = []
        for leaf in self._leaves(index)[1:]:
            size = leaf.shape[-1] if leaf.ndim == 3 else 1
            half, rest = leaf[..., : size // 2], leaf[..., size // 2 :]
            if leaf.is_floating_point() and size % 2 == 0 and torch.equal(half, rest):
                found.append(half[0])
        return (found[0], found[1]) if len(found) == 2 else None


class _EagerAttention:
    """The model's own eager attention; `seen` takes note of the calls."""

    seen: LayerObservation

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """transformers' attention interface: the model's own eager attention."""
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        window, cap = sliding_window or 0, float(softcap or 0.0)
        heads, before = (query[0], key[0], value[0]), len(self.seen.modules)
        self.seen.attention.append(AttentionCall(*heads, scale, window, cap, before))
        given = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
        own = {name: setting for name, setting in given.items() if setting is not None}
        eager = sys.modules[type(module).__module__].eager_attention_forward
        result: tuple[Tensor, Tensor | None] = eager(
            module, query, key, value, attention_mask, **own, **others
        )
        return result


@contextlib.contextmanager
def observing(skeleton: Skeleton) -> Iterator[Observer]:
    """An observer of `skeleton`, whose weights are random meanwhile."""
    attention = _EagerAttention()
    eager_mask = ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    with (
        torch.no_grad(),
        stand_in_weights(skeleton.model, torch.float64),
        routed_attention(skeleton.model, attention),
        InDouble(),
    ):
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, eager_mask)
        try:
            recorder = record_calls(skeleton, _positions())
            yield Observer(skeleton, recorder, attention)
        finally:
            del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[ATTENTION_NAME]


def _positions() -> Tensor:
    return torch.arange(FIRST_POSITION, FIRST_POSITION + TOKENS)[None]


def _widened(leaf: Any) -> Any:
    return torch.float64 if leaf is torch.float32 else leaf


def _random(shape: Any, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


@contextlib.contextmanager
def _random_weights(layer: nn.Module, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Within this context every weight of `layer` is random, about as large as trained ones."""
    saved, weights = [], {}
    for name, weight in list(weights_of(layer)):
        path, _, own = name.rpartition(".")
        module = layer.get_submodule(path)
        values = _random(weight.shape, generator)
        if weight.ndim > 1:
            values *= weight.shape[-1] ** -0.5
        else:
            values = values * 0.3 + (own == "weight")
        is_parameter = own in module._parameters
        place: dict[str, Any] = module._parameters if is_parameter else module._buffers
        saved.append((place, own, weight))
        place[own] = nn.Parameter(values, requires_grad=False) if is_parameter else values
        weights[name] = values
    try:
        yield weights
    finally:
        for place, own, weight in saved:
            place[own] = weight


@contextlib.contextmanager
def _watched(owner: nn.Module, calls: list[ModuleCall]) -> Iterator[None]:
    """Within this context each module below `owner` with a weight adds its calls to `calls`."""

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                # what comes next may write into them
                given, result = args[0][0].clone(), output[0].clone()
                weight = module.get_parameter("weight")
                calls.append(ModuleCall(name, module, weight, given, result))

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in owner.named_modules()
        if module._parameters.get("weight") is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _few_rows(head: nn.Module) -> Iterator[None]:
    """Within this context `head` has random numbers for its first rows, and no others."""
    weight = head.get_parameter("weight")
    shape = (min(_HEAD_ROWS, weight.shape[0]), weight.shape[1])
    few = _random(shape, torch.Generator().manual_seed(1)) * shape[1] ** -0.5
    head._parameters["weight"] = nn.Parameter(few, requires_grad=False)
    try:
        yield
    finally:
        head._parameters["weight"] = weight
