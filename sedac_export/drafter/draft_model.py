"""The trained drafter in PyTorch: one decoder layer that continues the model's hidden states.

In the manner of EAGLE-3 (Li et al. 2025, https://arxiv.org/abs/2503.01840): the residual stream
after a low, a middle and the last layer, and the embedding of the token that followed, give the
model's next-but-one token. Further tokens are drafted from the drafter's own output.
"""

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from sedac_export.model.decoder import cache_argument


@dataclass(frozen=True)
class DrafterShape:
    """The sizes of a drafter: those of one layer of the model that it drafts for.

    feature_layers: numbers of layers after which it takes the residual stream, ascending, the last
    one full depth. vocab_size: logits of the model, of which the drafter gives some.
    """

    hidden_size: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    head_size: int
    rope_theta: float
    norm_epsilon: float
    vocab_size: int
    feature_layers: tuple[int, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "DrafterShape":
        """The shape that fits `model`."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        layers = config.num_hidden_layers
        rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            heads=heads,
            key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            rope_theta=float(rope.get("rope_theta", 10000.0)),
            norm_epsilon=float(getattr(config, "rms_norm_eps", 1e-5)),
            vocab_size=config.vocab_size,
            feature_layers=feature_layers(layers),
        )

    def metadata(self) -> dict[str, Any]:
        """The shape as JSON holds it."""
        return asdict(self)

    @property
    def layer_config(self) -> LlamaConfig:
        """The decoder layer's configuration."""
        config = LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            head_dim=self.head_size,
            num_hidden_layers=1,
            rms_norm_eps=self.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
        )
        config._attn_implementation = "sdpa"
        return config


def feature_layers(layers: int) -> tuple[int, ...]:
    """The depths whose residual streams a drafter for a model of `layers` layers takes.

    As in EAGLE-3: near the input, in the middle, and full depth, each once.
    """
    return tuple(sorted({min(2, layers), max(1, layers // 2), layers}))


class DraftModel(nn.Module):
    """Hidden states and embeddings [batch, tokens, ..] -> the drafter's hidden states."""

    def __init__(self, shape: DrafterShape) -> None:
        super().__init__()
        self.shape = shape
        config = shape.layer_config
        hidden, epsilon = shape.hidden_size, shape.norm_epsilon
        taken = len(shape.feature_layers)
        self.feature_norms = nn.ModuleList(LlamaRMSNorm(hidden, epsilon) for _ in range(taken))
        self.combine = nn.Linear(taken * hidden, hidden, bias=False)
        self.state_norm = LlamaRMSNorm(hidden, epsilon)
        self.embedding_norm = LlamaRMSNorm(hidden, epsilon)
        self.join = nn.Linear(2 * hidden, hidden, bias=False)
        self.layer = LlamaDecoderLayer(config, 0)
        self.norm = LlamaRMSNorm(hidden, epsilon)
        self.rotary = LlamaRotaryEmbedding(config)

    def state_of(self, features: Sequence[Tensor]) -> Tensor:
        """The state [batch, tokens, hidden] that the model's residual streams give."""
        normed = [norm(x) for norm, x in zip(self.feature_norms, features, strict=True)]
        state: Tensor = self.combine(torch.cat(normed, -1))
        return state

    def forward(
        self,
        state: Tensor,
        embedding: Tensor,
        position_ids: Tensor,
        mask: Tensor | None,
        cache: DynamicCache,
    ) -> Tensor:
        """The next state. `cache` grows by these tokens; mask is added to attention's scores.

        state: of the model (`state_of`) or the drafter's own. embedding: of the next token.
        """
        joined = torch.cat([self.state_norm(state), self.embedding_norm(embedding)], -1)
        x = state + self.join(joined)
        output = self.layer(
            x,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            position_embeddings=self.rotary(x, position_ids),
            **{cache_argument(inspect.signature(self.layer.forward).parameters): cache},
        )
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def logits(self, state: Tensor, head: Tensor) -> Tensor:
        """Logits [.., draft vocabulary] of `state`; head: the rows of the model's own head."""
        return nn.functional.linear(self.norm(state), head)


def rollout_mask(length: int, step: int, device: torch.device) -> Tensor:
    """Which keys the queries of rollout step `step` see: bool [1, 1, length, (step + 1) * length].

    The cache holds the keys of all steps so far. A position sees the model's states up to itself
    and what the drafter rolled out from itself: training sees what drafting will (training-time
    test, EAGLE-3).
    """
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    own = torch.eye(length, dtype=torch.bool, device=device)
    return torch.cat([causal, *[own] * step], -1)[None, None]
