"""transformers as the reference: greedy decoding at full depth and with exits."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sedac_export.model.decoder import cache_argument

# two logits closer than this may change places by rounding
TIE = 1e-4

KvFill = Literal["propagate", "defer"]


class ExitRule(Protocol):
    """Decides for decoded tokens, numbered from 0, all of one pass at once."""

    def begin(self, decoded: range) -> None:
        """Start with the tokens of these numbers."""

    def stops(self, depth: int, stability: Tensor) -> Tensor:
        """Which of them need no layer after `depth`; stability is that layer's, fp32 [tokens]."""


class Forced:
    """Exit the n-th decoded token after depths[n % len(depths)] layers."""

    def __init__(self, depths: Sequence[int]) -> None:
        self.depths = depths

    def begin(self, decoded: range) -> None:
        self.wanted = torch.tensor([self.depths[n % len(self.depths)] for n in decoded])

    def stops(self, depth: int, stability: Tensor) -> Tensor:
        return depth >= self.wanted


class Stable:
    """V7: exit after k consecutive layers of stability tau, from min_depth layers on."""

    def __init__(self, tau: float, k: int, min_depth: int) -> None:
        self.tau, self.k, self.min_depth = tau, k, min_depth

    def begin(self, decoded: range) -> None:
        self.run = torch.zeros(len(decoded), dtype=torch.int64)

    def stops(self, depth: int, stability: Tensor) -> Tensor:
        self.run = torch.where(stability >= self.tau, self.run + 1, 0)
        return (self.run >= self.k) & (depth >= self.min_depth)


@torch.no_grad()
def assert_decoded(
    model: PreTrainedModel,
    prompt: Sequence[int],
    tokens: Sequence[int],
    rule: ExitRule | None = None,
    kv_fill: KvFill = "propagate",
) -> list[int]:
    """Fail unless greedy decoding after `prompt` gives `tokens`; the layers that each one ran.

    All tokens are judged in one pass: each must have the largest logit after those before it, or
    tie with it. That takes no token for granted that follows a tie.
    """
    layers = decoder_layers(model)
    text = [*prompt, *tokens[:-1]]
    with exiting(layers, rule, range(len(tokens) - 1), kv_fill) as exits:
        logits = model(torch.tensor([text]), use_cache=False).logits[0, len(prompt) - 1 :]
    chosen = logits.gather(-1, torch.tensor(tokens)[:, None])
    others = logits.scatter(-1, torch.tensor(tokens)[:, None], -torch.inf)
    leads = (chosen[:, 0] - others.amax(-1)).tolist()
    # where all logits are tied, any token would do
    assert sum(abs(lead) > TIE for lead in leads) > len(leads) / 2
    for index, (token, lead) in enumerate(zip(tokens, leads, strict=True)):
        assert lead > -TIE, f"token {index} is {token}, whose logit is behind by {-lead}"
    return [len(layers), *exits.depths.tolist()]


@dataclass(frozen=True)
class Greedy:
    """Tokens, and the layers that each one ran."""

    tokens: list[int]
    exit_layers: list[int]


@torch.no_grad()
def greedy(
    model: PreTrainedModel, prompt: Sequence[int], count: int, rule: ExitRule | None = None
) -> Greedy:
    """Decode `count` tokens after `prompt` one at a time, exits decided by `rule`.

    Skipped layers still put the keys and values of the exit hidden state into their caches: that
    is the propagate rule, computed by the model's own layers.
    """
    argument = cache_argument(inspect.signature(model.forward).parameters)
    settings = {argument: DynamicCache(config=model.config), "use_cache": True}
    layers = decoder_layers(model)
    logits = model(torch.tensor([list(prompt)]), **settings).logits
    result = Greedy([int(logits[0, -1].argmax())], [len(layers)])
    for number in range(count - 1):
        step = torch.tensor([[result.tokens[-1]]])
        with exiting(layers, rule, range(number, number + 1)) as exits:
            logits = model(step, **settings).logits
        result.tokens.append(int(logits[0, -1].argmax()))
        result.exit_layers.append(int(exits.depths))
    return result


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers, shallowest first."""
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList)))


class _Exits:
    """The way of a pass's newest tokens through the layers: after its exit a token's state stays.

    depths: the layers that each one ran. Deferred tokens go on, for their keys and values, and
    have the state of their exit after the last layer again.
    """

    def __init__(self, rule: ExitRule | None, tokens: int, layers: int, kv_fill: KvFill) -> None:
        self.rule, self.tokens, self.layers, self.kv_fill = rule, tokens, layers, kv_fill
        self.layer = 0
        self.exited = torch.zeros(tokens, dtype=torch.bool)
        self.depths = torch.full((tokens,), layers)
        self.states = torch.empty(0)

    def after_layer(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        self.layer += 1
        newest = slice(after.shape[1] - self.tokens, None)
        if self.rule is not None:
            self._decide(before[0, newest], after[0, newest])
            if self.kv_fill == "propagate" or self.layer == self.layers:
                after = after.clone()
                after[0, newest] = self.states
        return (after, *output[1:]) if isinstance(output, tuple) else after

    def _decide(self, before: Tensor, after: Tensor) -> None:
        assert self.rule is not None
        kept = self.states if self.layer > 1 else after
        self.states = torch.where(self.exited[:, None], kept, after)
        stability = (torch.cosine_similarity(before, after, dim=-1) + 1) / 2
        stops = self.rule.stops(self.layer, stability) & ~self.exited
        self.depths[stops] = self.layer
        self.exited |= stops


@contextmanager
def exiting(
    layers: list[nn.Module],
    rule: ExitRule | None,
    decoded: range,
    kv_fill: KvFill = "propagate",
) -> Iterator[_Exits]:
    """Within this context the decoded tokens, the newest of a pass, run under `rule`."""
    exits = _Exits(rule, len(decoded), len(layers), kv_fill)
    if rule is not None:
        rule.begin(decoded)
    hooks = [layer.register_forward_hook(exits.after_layer, with_kwargs=True) for layer in layers]
    try:
        yield exits
    finally:
        for hook in hooks:
            hook.remove()
