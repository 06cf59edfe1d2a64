"""transformers as the reference: greedy decoding at full depth and with forced exits."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

# two logits closer than this may change places by rounding
TIE = 1e-4


@dataclass(frozen=True)
class Greedy:
    """Tokens, by how much each one's logit leads the second, and the layers it ran."""

    tokens: list[int]
    leads: list[float]
    exit_layers: list[int]

    def assert_same(self, tokens: Sequence[int]) -> None:
        """Fail unless `tokens` are the same, or differ first where two logits are tied."""
        assert len(tokens) == len(self.tokens)
        for index, (got, expected) in enumerate(zip(tokens, self.tokens, strict=True)):
            if got != expected:
                lead = self.leads[index]
                assert lead < TIE, f"token {index} is {got}, not {expected} which leads by {lead}"
                return


class Forced:
    """Exit the n-th decoded token after depths[n % len(depths)] layers."""

    def __init__(self, depths: Sequence[int]) -> None:
        self.depths, self.decoded = depths, -1

    def begin(self) -> None:
        self.decoded += 1

    def stops(self, depth: int, stability: float) -> bool:
        return depth >= self.depths[self.decoded % len(self.depths)]


class Stable:
    """V7: exit after k consecutive layers of stability tau, from min_depth layers on."""

    def __init__(self, tau: float, k: int, min_depth: int) -> None:
        self.tau, self.k, self.min_depth, self.run = tau, k, min_depth, 0

    def begin(self) -> None:
        self.run = 0

    def stops(self, depth: int, stability: float) -> bool:
        self.run = self.run + 1 if stability >= self.tau else 0
        return self.run >= self.k and depth >= self.min_depth


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    prompt: Sequence[int],
    count: int,
    policy: Forced | Stable | None = None,
) -> Greedy:
    """Decode `count` tokens after `prompt`, exits decided by `policy`.

    Skipped layers still put the keys and values of the exit hidden state into their caches: that
    is the propagate rule, computed by the model's own layers.
    """
    cache = DynamicCache(config=model.config)
    layers = decoder_layers(model)
    logits = model(torch.tensor([list(prompt)]), past_key_values=cache, use_cache=True).logits
    result = Greedy([], [], [])
    depth = len(layers)
    while True:
        top = logits[0, -1].topk(2)
        result.tokens.append(int(top.indices[0]))
        result.leads.append(float(top.values[0] - top.values[1]))
        result.exit_layers.append(depth)
        if len(result.tokens) == count:
            return result
        step = torch.tensor([[result.tokens[-1]]])
        with exiting(layers, policy) as token:
            logits = model(step, past_key_values=cache, use_cache=True).logits
        depth = token.depth


@torch.no_grad()
def greedy_deferred(
    model: PreTrainedModel, prompt: Sequence[int], count: int, exits: Sequence[int]
) -> Greedy:
    """Decode with exits whose caches hold what full depth computes.

    Without a cache: at each step all tokens run to the depth of the newest one's exit, so the
    exits of earlier ones leave no trace.
    """
    layers = decoder_layers(model)
    result = Greedy([], [], [])
    for index in range(count):
        depth = exits[(index - 1) % len(exits)] if index else len(layers)
        tokens = torch.tensor([[*prompt, *result.tokens]])
        with exiting(layers, Forced([depth])):
            logits = model(tokens, use_cache=False).logits
        top = logits[0, -1].topk(2)
        result.tokens.append(int(top.indices[0]))
        result.leads.append(float(top.values[0] - top.values[1]))
        result.exit_layers.append(depth)
    return result


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers, shallowest first."""
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList)))


class _Token:
    """One token's way through the layers: after its exit they pass its hidden state on."""

    def __init__(self, policy: Forced | Stable | None, layers: int) -> None:
        self.policy, self.layers = policy, layers
        self.depth, self.exited = 0, False

    def after_layer(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        if self.exited:
            return (before, *output[1:]) if isinstance(output, tuple) else before
        self.depth += 1
        after = output[0] if isinstance(output, tuple) else output
        stability = (torch.cosine_similarity(before, after, dim=-1)[0, -1].item() + 1) / 2
        wants = self.policy is not None and self.policy.stops(self.depth, stability)
        self.exited = wants and self.depth < self.layers
        return output


@contextmanager
def exiting(layers: list[nn.Module], policy: Forced | Stable | None) -> Iterator[_Token]:
    """Within this context one token runs under `policy`."""
    token = _Token(policy, len(layers))
    if policy is not None:
        policy.begin()
    hooks = [layer.register_forward_hook(token.after_layer, with_kwargs=True) for layer in layers]
    try:
        yield token
    finally:
        for hook in hooks:
            hook.remove()
