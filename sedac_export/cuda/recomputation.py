"""What the kernel computes, in float64: a description is right where this gives a layer's numbers.

Rows are consecutive positions of one text, [positions, numbers].
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sedac_export.bundle.cuda_entry import ChainOptions, ChainShape
from sedac_export.cuda.layer_weights import GATED_ROWS

Tables = tuple[Tensor, Tensor]


def layer(
    hidden: Tensor,
    weights: Mapping[str, Tensor],
    shape: ChainShape,
    options: ChainOptions,
    window: int,
    tables: Tables,
) -> Tensor:
    """The residual stream after a layer.

    weights: by the names that they have in the packed file, matrices as [rows, columns]. tables:
    cosines and sines [positions, half the rotary size].
    """

    def product(name: str, x: Tensor) -> Tensor:
        bias = weights.get(f"{name}_bias")
        y = x @ weights[name].T
        return y if bias is None else y + bias

    def normed(name: str, x: Tensor) -> Tensor:
        weight = weights.get(name)
        return x if weight is None else rms_norm(x, weight, options.norm_epsilon)

    heads, groups, size = shape.heads, shape.key_value_heads, shape.head_size
    qkv = product("qkv", normed("attention_norm", hidden)).reshape(len(hidden), -1, size)
    query, key, value = qkv[:, :heads], qkv[:, heads : heads + groups], qkv[:, heads + groups :]
    query = rotated(normed("query_norm", query), tables)
    key = rotated(normed("key_norm", key), tables)
    attended = attention(query, key, value, options, window).flatten(1)
    hidden = hidden + normed("attention_post_norm", product("o", attended))
    gate_up = product("gate_up", normed("mlp_norm", hidden))
    gate_up = gate_up.reshape(len(hidden), -1, 2, GATED_ROWS)
    gate, up = gate_up[:, :, 0].flatten(1), gate_up[:, :, 1].flatten(1)
    down = product("down", activated(gate, options.activation) * up)
    return hidden + normed("mlp_post_norm", down)


def head(hidden: Tensor, norm: Tensor, matrix: Tensor, options: ChainOptions) -> Tensor:
    """Logits [positions, vocabulary]."""
    logits = rms_norm(hidden, norm, options.norm_epsilon) @ matrix.T
    return capped(logits, options.logits_softcap)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x` [..., numbers] by its root mean square, times `weight` [numbers]."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def rotated(x: Tensor, tables: Tables) -> Tensor:
    """`x` [positions, heads, size], the two halves of its first numbers rotated."""
    cos, sin = (table[:, None] for table in tables)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def attention(
    query: Tensor, key: Tensor, value: Tensor, options: ChainOptions, window: int
) -> Tensor:
    """[positions, heads, size]; each position sees `window` up to itself, all where that is 0."""
    group = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * options.attention_scale
    scores = capped(scores, options.attention_softcap)
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    if window:
        seen = seen.triu(1 - window)
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, values)


def activated(gate: Tensor, activation: str) -> Tensor:
    """The activation of `gate`."""
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def capped(x: Tensor, cap: float) -> Tensor:
    """`x` bounded to -cap..cap, unchanged where cap is 0."""
    return torch.tanh(x / cap) * cap if cap else x
