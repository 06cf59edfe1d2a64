"""Run the original model with its weights streamed in, to compare engines against."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sedac_export.skeleton import Skeleton
from sedac_export.stamp import stored


@dataclass
class Reference:
    """Hidden states and logits of one sequence, fp32.

    hidden[l] is the residual stream [1, tokens, hidden] after l layers, logits [1, tokens, vocab].
    """

    hidden: list[Tensor]
    logits: Tensor


@torch.no_grad()
def run_reference(skeleton: Skeleton, input_ids: Tensor, precision: str) -> Reference:
    """transformers' own eager forward of `input_ids` [1, tokens], without a cache.

    Weights are rounded to `precision` as they are in the bundle and computed with in fp32. Each
    module's weights are in memory only while it runs.
    """
    hidden: list[Tensor] = []
    with streamed_weights(skeleton, precision), _watched(skeleton, hidden):
        output = skeleton.model(input_ids=input_ids, use_cache=False)
    return Reference(hidden, output.logits)


@contextlib.contextmanager
def streamed_weights(skeleton: Skeleton, precision: str) -> Iterator[None]:
    """Within this context every module reads its weights when called and drops them after."""
    handles = []
    for path, module in skeleton.model.named_modules():
        parameters = {name: p for name, p in module._parameters.items() if p is not None}
        if parameters:
            stream = _Stream(skeleton, precision, path, parameters)
            handles.append(module.register_forward_pre_hook(stream.load))
            handles.append(module.register_forward_hook(stream.drop, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Stream:
    skeleton: Skeleton
    precision: str
    path: str
    meta: dict[str, nn.Parameter]

    def load(self, module: nn.Module, _: Any) -> None:
        for name in self.meta:
            full = f"{self.path}.{name}" if self.path else name
            value = torch.empty(self.meta[name].shape)
            row = 0
            for piece in self.skeleton.pieces(full):
                rows = stored(piece, self.precision, full)
                value[row : row + len(rows)] = rows
                row += len(rows)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)

    def drop(self, module: nn.Module, *_: Any) -> None:
        module._parameters.update(self.meta)


@contextlib.contextmanager
def _watched(skeleton: Skeleton, hidden: list[Tensor]) -> Iterator[None]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, __: Any, output: Any) -> None:
        hidden.append(output[0] if isinstance(output, tuple) else output)

    handles = [skeleton.layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(after) for layer in skeleton.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
