"""transformers as the reference: greedy decoding at full depth and with forced exits."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

# two logits closer than this may change places by rounding
TIE = 1e-4


@dataclass(frozen=True)
class Greedy:
    """Tokens, by how much each one's logit leads all others', and the layers it ran.

    along: the same decoding where other tokens are chosen, whose leads may then be negative.
    """

    tokens: list[int]
    leads: list[float]
    exit_layers: list[int]
    along: Callable[[Sequence[int]], "Greedy"]

    def assert_same(self, tokens: Sequence[int]) -> None:
        """Fail unless each token, after those before it, has the largest logit or ties with it."""
        assert len(tokens) == len(self.tokens)
        # of logits that are all tied, any token would do
        assert sum(lead > TIE for lead in self.leads) > len(self.leads) / 2
        chosen = self if list(tokens) == self.tokens else self.along(tokens)
        for index, (token, lead) in enumerate(zip(tokens, chosen.leads, strict=True)):
            assert lead > -TIE, f"token {index} is {token}, whose logit is behind by {-lead}"


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
    text: Sequence[int] | None = None,
) -> Greedy:
    """Decode `count` tokens after `prompt`, exits decided by `policy`; those of `text` if given.

    Skipped layers still put the keys and values of the exit hidden state into their caches: that
    is the propagate rule, computed by the model's own layers.
    """
    cache = DynamicCache(config=model.config)
    layers, deciding = decoder_layers(model), copy(policy)
    logits = model(torch.tensor([list(prompt)]), past_key_values=cache, use_cache=True).logits
    result = Greedy([], [], [], lambda text: greedy(model, prompt, count, policy, text))
    depth = len(layers)
    while True:
        _choose(result, logits[0, -1], depth, text)
        if len(result.tokens) == count:
            return result
        step = torch.tensor([[result.tokens[-1]]])
        with exiting(layers, deciding) as token:
            logits = model(step, past_key_values=cache, use_cache=True).logits
        depth = token.depth


@torch.no_grad()
def greedy_deferred(
    model: PreTrainedModel,
    prompt: Sequence[int],
    count: int,
    exits: Sequence[int],
    text: Sequence[int] | None = None,
) -> Greedy:
    """Decode with exits whose caches hold what full depth computes; as `greedy` otherwise.

    Without a cache: at each step all tokens run to the depth of the newest one's exit, so the
    exits of earlier ones leave no trace.
    """
    layers = decoder_layers(model)
    result = Greedy([], [], [], lambda text: greedy_deferred(model, prompt, count, exits, text))
    for index in range(count):
        depth = exits[(index - 1) % len(exits)] if index else len(layers)
        tokens = torch.tensor([[*prompt, *result.tokens]])
        with exiting(layers, Forced([depth])):
            logits = model(tokens, use_cache=False).logits
        _choose(result, logits[0, -1], depth, text)
    return result


def _choose(result: Greedy, logits: torch.Tensor, depth: int, text: Sequence[int] | None) -> None:
    """Add the next token of `text`, or the one with the largest logit."""
    token = int(logits.argmax()) if text is None else text[len(result.tokens)]
    others = logits.clone()
    others[token] = -torch.inf
    result.tokens.append(token)
    result.leads.append(float(logits[token] - others.max()))
    result.exit_layers.append(depth)


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
