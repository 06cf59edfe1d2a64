"""Which of a layer's modules does what, told from the numbers that passed through them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from sedac_export.bundle.cuda_entry import Activation
from sedac_export.cuda.layer_weights import LayerWeights, NormWeight, Rows
from sedac_export.cuda.observation import AttentionCall, LayerObservation, ModuleCall, Tables
from sedac_export.cuda.recomputation import activated, rms_norm, rotated
from sedac_export.errors import SedacError
from sedac_export.graph.operators import RmsNorm, rms_norm_of

# two results of the same sums in float64
_SAME = 1e-9


class NoChainError(SedacError):
    """The kernel cannot run this model; the message is the reason, half a sentence."""


@dataclass(frozen=True)
class IdentifiedLayer:
    """What a layer's modules are, and the numbers that it was seen to use."""

    weights: LayerWeights
    attention: AttentionCall
    activation: Activation
    tables: Tables | None
    epsilons: set[float]


def identify(seen: LayerObservation) -> IdentifiedLayer:
    """What the observed layer is made of. Raises NoChainError when that is unclear."""
    return _Identification(seen).run()


def find_norm(call: ModuleCall) -> RmsNorm:
    """The RMS norm that the module of `call` is. Raises NoChainError when it is none."""
    norm = rms_norm_of(call.module)
    if norm is None:
        raise NoChainError(f"{call.name} is a {type(call.module).__name__}, which is no RMS norm")
    return norm


def is_same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same numbers but for rounding."""
    return x.shape == y.shape and bool((x - y).norm() <= _SAME * y.norm())


class _Identification:
    def __init__(self, seen: LayerObservation) -> None:
        if len(seen.attention) != 1:
            raise NoChainError(f"its layers attend {len(seen.attention)} times")
        self.seen, self.attention = seen, seen.attention[0]
        self.norms = [call for call in seen.modules if call.weight.ndim == 1]
        self.facts = {call.name: find_norm(call) for call in self.norms}
        self.placed: dict[str, NormWeight] = {}
        before = seen.modules[: self.attention.before]
        after = seen.modules[self.attention.before :]
        self.before = [_linear(call) for call in before if call.weight.ndim != 1]
        self.after = [_linear(call) for call in after if call.weight.ndim != 1]

    def run(self) -> IdentifiedLayer:
        if not self.after:
            raise NoChainError("its attention has no output projection")
        o, *mlp = self.after
        gate, up, down, activation = self._mlp(mlp)
        query, key, value, tables = self._heads()
        entry = next(call for call in self.before if call.name == query.module)
        self._place("attention_norm", before=entry)
        self._place("attention_post_norm", after=o.output)
        self._place("mlp_norm", before=mlp[0])
        self._place("mlp_post_norm", after=mlp[-1].output)
        left = self.facts.keys() - {norm.module for norm in self.placed.values()}
        if left:
            raise NoChainError(f"the place of its norm {min(left)} is not the kernel's")
        weights = LayerWeights(query, key, value, _whole(o), gate, up, down, self.placed)
        epsilons = {norm.epsilon for norm in self.facts.values()}
        return IdentifiedLayer(weights, self.attention, activation, tables, epsilons)

    def _heads(self) -> tuple[Rows, Rows, Rows, Tables | None]:
        attention = self.attention
        heads = (attention.query, attention.key, attention.value)
        query, key, value = (x.transpose(0, 1) for x in heads)
        sizes = [x.shape[1] * x.shape[2] for x in (query, key, value)]
        for parts in _orders(self.before, sizes):
            outputs = [self._output(part) for part in parts]
            if not torch.equal(outputs[2], value.flatten(1)):
                continue
            for tables in (self.seen.tables, None):
                with_query = self._as_heads(parts[0], "query_norm", query, tables)
                with_key = self._as_heads(parts[1], "key_norm", key, tables)
                if with_query is not None and with_key is not None:
                    self.placed |= with_query | with_key
                    return parts[0], parts[1], parts[2], tables
        raise NoChainError("its queries, keys and values are not rotated products of one input")

    def _as_heads(
        self, part: Rows, name: str, heads: Tensor, tables: Tables | None
    ) -> dict[str, NormWeight] | None:
        """The norm, if any, by which the product `part` became `heads`; None where it did not."""
        output = self._output(part)
        x = output.reshape(heads.shape)
        layouts = (output, x, x.transpose(0, 1))
        norms = {}
        call = next(
            (c for c in self.norms if any(torch.equal(c.input, given) for given in layouts)), None
        )
        if call is not None:
            if call.weight.numel() != heads.shape[2]:
                raise NoChainError(f"{call.name} norms all heads together")
            fact = self.facts[call.name]
            norms[name] = NormWeight(call.name, fact.offset)
            x = rms_norm(x, call.weight + fact.offset, fact.epsilon)
        turned = x if tables is None else rotated(x, tables)
        return norms if is_same(turned, heads) else None

    def _mlp(self, calls: list[ModuleCall]) -> tuple[Rows, Rows, Rows, Activation]:
        if len(calls) not in (2, 3):
            raise NoChainError(f"its MLP is made of {len(calls)} products")
        *gated, down = calls
        size = down.input.shape[-1]
        for gate, up in _orders(gated, [size, size]):
            for activation in get_args(Activation):
                x = activated(self._output(gate), activation) * self._output(up)
                if is_same(x, down.input):
                    return gate, up, _whole(down), activation
        if len(gated) == 1 and gated[0].output.shape[-1] == size:
            raise NoChainError("its MLP is not gated")
        raise NoChainError("its MLP is not gated by SiLU or the tanh form of GELU")

    def _place(
        self, name: str, before: ModuleCall | None = None, after: Tensor | None = None
    ) -> None:
        """Take the norm that gave the input of `before`, or that took `after`, for `name`."""
        for call in self.norms:
            gives = before is not None and torch.equal(call.output, before.input)
            takes = after is not None and torch.equal(call.input, after)
            if gives or takes:
                self.placed[name] = NormWeight(call.name, self.facts[call.name].offset)

    def _output(self, part: Rows) -> Tensor:
        call = next(call for call in self.seen.modules if call.name == part.module)
        return call.output[:, part.start : part.stop]


def _linear(call: ModuleCall) -> ModuleCall:
    if not isinstance(call.module, nn.Linear):
        raise NoChainError(f"{call.name} is a {type(call.module).__name__}, which is no Linear")
    return call


def _whole(call: ModuleCall) -> Rows:
    return Rows(call.name, 0, call.output.shape[-1], call.module.bias is not None)


def _orders(calls: list[ModuleCall], sizes: list[int]) -> Iterator[list[Rows]]:
    """Every way in which the products of `calls`, one of them if it is fused, have `sizes` rows."""
    if len(calls) == 1 and calls[0].output.shape[-1] == sum(sizes):
        whole = _whole(calls[0])
        ends = list(itertools.accumulate(sizes))
        parts = [
            Rows(whole.module, end - size, end, whole.biased)
            for end, size in zip(ends, sizes, strict=True)
        ]
    else:
        parts = [_whole(call) for call in calls]
    for order in itertools.permutations(parts):
        if [part.stop - part.start for part in order] == sizes:
            yield list(order)
