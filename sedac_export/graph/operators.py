"""Trace attention, rotary embeddings and RMS norms as single ONNX operators.

transformers computes them from primitives; ONNX Runtime has one fused kernel for each. A patch is
applied only where the operator computes the same numbers as the module it stands for, so a model
with a variant of its own keeps its primitives and stays right.
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sedac_export.errors import SedacError
from sedac_export.graph.masks import KnownMasks

ATTENTION_NAME = "sedac_attention"
HALF = "sedac_half"

_IGNORED_ATTENTION_ARGUMENTS = frozenset(
    {
        "dropout",
        "is_causal",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "position_embeddings",
    }
)


class AttentionCache(Protocol):
    """What stands in for transformers' cache while a layer is traced."""

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take this step's heads, [batch, key-value heads, tokens, head size] each."""

    def attend(self, query: Tensor, **settings: Any) -> Tensor:
        """The attention's output, [batch, tokens, heads, head size]."""


class AttentionRouter:
    """Sends every attention call of a model to the cache of the layer being traced.

    masks tells what those that a layer hands on mean; without it transformers makes none.
    """

    def __init__(self, masks: KnownMasks | None = None) -> None:
        self.cache: AttentionCache | None = None
        self.masks = masks

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
    ) -> tuple[Tensor, None]:
        """transformers' attention interface."""
        unknown = sorted(
            name
            for name, argument in others.items()
            if argument is not None and name not in _IGNORED_ATTENTION_ARGUMENTS
        )
        if unknown:
            raise SedacError(
                f"{type(module).__name__} passes {', '.join(unknown)} to attention, which the"
                " engines cannot express; this model is not supported"
            )
        if attention_mask is not None:
            self._check_mask(module, attention_mask, sliding_window)
        if key.shape[-1] != value.shape[-1]:
            raise SedacError(
                f"{type(module).__name__} has keys of {key.shape[-1]} and values of"
                f" {value.shape[-1]} numbers a head; engines need them equal"
            )
        assert self.cache is not None
        output = self.cache.attend(
            query, scale=scaling, window=sliding_window or -1, softcap=softcap or 0.0
        )
        return output, None

    def _check_mask(self, module: nn.Module, mask: Tensor, window: int | None) -> None:
        if self.masks is None or not self.masks.is_causal(mask, window):
            told = f"a window of {window}" if window else "all positions before"
            raise SedacError(
                f"{type(module).__name__} tells attention to see {told}, and its mask shows"
                " something else (a window, chunks or biases), which the engines cannot express;"
                " this model is not supported"
            )


def group_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor],
    lengths: tuple[Tensor, Tensor],
    scale: float | None,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX Runtime's GroupQueryAttention over a cache that is updated in place.

    query: [batch, heads, tokens, head size]; key, value: the same with key-value heads; past: key
    and value caches [batch, key-value heads, cache length, head size]; lengths: `seqlens_k` int32
    [batch] (entries after this step, minus one) and `total_sequence_length` int32 scalar. window
    is the number of positions seen, -1 for all. Returns the output [batch, tokens, heads, head
    size] and the two updated caches.

    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    """
    heads, key_heads = query.shape[1], key.shape[1]
    flat = [_heads_last(tensor) for tensor in (query, key, value)]
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": key_heads}
    if scale is not None:
        attributes["scale"] = float(scale)
    if window > 0:
        attributes["local_window_size"] = int(window)
    if softcap:
        attributes["softcap"] = float(softcap)
    output, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (*flat, *past, *lengths),
        attributes,
        dtypes=[query.dtype] * 3,
        shapes=[flat[0].shape, past[0].shape, past[1].shape],
        version=1,
    )
    return _split_heads(output, heads), present_key, present_value


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, softcap: float
) -> Tensor:
    """ONNX's Attention over whole caches, of which `mask` says what each token sees.

    query: [batch, heads, tokens, head size]; key, value: [batch, key-value heads, cache length,
    head size]; mask: bool [batch, 1, tokens, cache length]. Returns the output [batch, tokens,
    heads, head size]. https://onnx.ai/onnx/operators/onnx__Attention.html

    With a soft cap it is primitives: TensorRT refuses the operator's attribute.
    """
    if softcap:
        return _capped_attention(query, key, value, mask, scale, softcap)
    attributes: dict[str, Any] = {} if scale is None else {"scale": float(scale)}
    output = torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value, mask),
        attributes,
        dtype=query.dtype,
        shape=query.shape,
        version=24,
    )
    return output.transpose(1, 2)


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, softcap: float
) -> Tensor:
    """Attention with scores s * scale bounded as softcap * tanh(s * scale / softcap)."""
    key_heads, size = key.shape[1], query.shape[3]
    batch, heads, tokens, _ = query.shape
    grouped = query.reshape(batch, key_heads, heads // key_heads, tokens, size)
    scores = grouped @ key.unsqueeze(2).transpose(3, 4)
    factor = (size**-0.5 if scale is None else scale) / softcap
    capped = torch.tanh(scores.float() * factor) * softcap
    unseen = torch.finfo(torch.float32).min
    weights = torch.where(mask.unsqueeze(1), capped, unseen).softmax(-1)
    output = weights.to(value.dtype) @ value.unsqueeze(2)
    return output.flatten(1, 2).transpose(1, 2)


def scatter(past: Tensor, update: Tensor, write_index: Tensor) -> Tensor:
    """`past` [batch, heads, cache length, size] with `update`'s tokens written at `write_index`.

    write_index: int64 [batch]. https://onnx.ai/onnx/operators/onnx__TensorScatter.html
    """
    return torch.onnx.ops.symbolic(
        "TensorScatter",
        (past, update, write_index),
        {"axis": -2, "mode": "linear"},
        dtype=past.dtype,
        shape=past.shape,
        version=24,
    )


@contextlib.contextmanager
def fused_operators(model: PreTrainedModel, router: AttentionRouter) -> Iterator[None]:
    """Within this context `model` traces to fused operators; afterwards it is as before."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(routed_attention(model, router))
        for name in {type(module).__module__ for module in model.modules()}:
            stack.enter_context(_fused_rotary(sys.modules[name]))
        for module in model.modules():
            stack.enter_context(_fused_norm(module))
        yield


def _heads_last(tensor: Tensor) -> Tensor:
    """[batch, heads, tokens, size] as [batch, tokens, heads * size]."""
    return tensor.transpose(1, 2).flatten(2)


def _split_heads(tensor: Tensor, heads: int) -> Tensor:
    """[batch, tokens, heads * size] as [batch, tokens, heads, size]."""
    return tensor.reshape(*tensor.shape[:2], heads, tensor.shape[2] // heads)


@contextlib.contextmanager
def routed_attention(model: PreTrainedModel, attention: Callable[..., Any]) -> Iterator[None]:
    """Within this context `model` computes attention by `attention`, as `ATTENTION_NAME`."""
    config = model.config.get_text_config()
    saved = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attention)
    config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = saved
        del ALL_ATTENTION_FUNCTIONS._global_mapping[ATTENTION_NAME]


@contextlib.contextmanager
def _fused_rotary(module: Any) -> Iterator[None]:
    original = getattr(module, "apply_rotary_pos_emb", None)
    if original is None or not _is_half_rotation(original):
        yield
        return
    module.apply_rotary_pos_emb = _rotary
    try:
        yield
    finally:
        module.apply_rotary_pos_emb = original


def _rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """transformers' apply_rotary_pos_emb; query and key are [batch, heads, tokens, size]."""
    size = cos.shape[-1]
    half_cos, half_sin = half(cos), half(sin)

    def rotate(tensor: Tensor) -> Tensor:
        rotated = _rotary_operator(tensor[..., :size], half_cos, half_sin)
        if tensor.shape[-1] == size:
            return rotated
        return torch.cat((rotated, tensor[..., size:]), dim=-1)

    return rotate(query), rotate(key)


def _rotary_operator(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = tensor.shape[1]
    # tables of more digits than the tensor: the model rotates in theirs
    flat = _heads_last(tensor).to(cos.dtype)
    rotated = torch.onnx.ops.symbolic(
        "RotaryEmbedding",
        (flat, cos, sin),
        {"interleaved": 0, "num_heads": heads},
        dtype=flat.dtype,
        shape=flat.shape,
        version=23,
    )
    return _split_heads(rotated, heads).transpose(1, 2).to(tensor.dtype)


def half(table: Tensor) -> Tensor:
    """The first half of a rotary table [batch, tokens, size] whose halves are equal."""
    known = getattr(table, HALF, None)
    return table[..., : table.shape[-1] // 2] if known is None else known


def _is_half_rotation(function: Callable[..., Any]) -> bool:
    """Whether `function` rotates the two halves of each head, as Llama does."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 3, 8, generator=generator)
    angles = torch.randn(1, 3, 4, generator=generator)
    cos, sin = (torch.cat((table, table), -1) for table in (angles.cos(), angles.sin()))
    try:
        rotated_query, rotated_key = function(query, key, cos, sin)
    except Exception:
        return False  # another signature: a rotation that we do not know
    for tensor, result in ((query, rotated_query), (key, rotated_key)):
        turned = torch.cat((-tensor[..., 4:], tensor[..., :4]), -1)
        expected = tensor * cos[:, None] + turned * sin[:, None]
        if result.shape != expected.shape or not torch.allclose(result, expected, atol=1e-6):
            return False
    return True


@contextlib.contextmanager
def _fused_norm(module: nn.Module) -> Iterator[None]:
    forward = _norm_operator(module) if "RMSNorm" in type(module).__name__ else None
    if forward is None:
        yield
        return
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _norm_operator(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A forward of `module` as one RMSNormalization, None when it computes something else."""
    norm = rms_norm_of(module)
    return None if norm is None else _rms_norm(module, norm.epsilon, norm.offset)


@dataclass(frozen=True)
class RmsNorm:
    """x / sqrt(mean(x^2) + epsilon) * (weight + offset), means over the weight's length."""

    epsilon: float
    offset: float


def rms_norm_of(module: nn.Module) -> RmsNorm | None:
    """The RMS norm that `module` computes, None when it computes something else."""
    weight = module._parameters.get("weight")
    names = ("variance_epsilon", "eps", "epsilon")
    epsilon = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    if weight is None or len(module._parameters) > 1 or not isinstance(epsilon, float):
        return None
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, *weight.shape, generator=generator)
    scale = torch.randn(weight.shape, generator=generator)
    stand_in = copy.copy(module)
    stand_in._parameters = {"weight": nn.Parameter(scale, requires_grad=False)}
    expected = type(module).forward(stand_in, sample)
    for offset in (0.0, 1.0):
        fused = F.rms_norm(sample, weight.shape, scale + offset, epsilon)
        if torch.allclose(fused, expected, atol=1e-5):
            return RmsNorm(epsilon, offset)
    return None


def _rms_norm(module: nn.Module, epsilon: float, offset: float) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight = module.get_parameter("weight")  # the exporter swaps it while it traces
        if not offset:
            return F.rms_norm(x, weight.shape, weight, epsilon)
        # in fp32 as in the models that do so: near 1 half precision would lose the weight's digits
        return F.rms_norm(x.float(), weight.shape, weight.float() + offset, epsilon).to(x.dtype)

    return forward
