"""Judging a text in one pass agrees with decoding token by token, and fails where it should."""

from collections.abc import Callable

import pytest
import torch
from conftest import TinyBundle
from eager import Forced, KvFill, Stable, assert_decoded, decoder_layers, exiting, greedy
from transformers import PreTrainedModel

PROMPT = list(range(3, 30))
DEPTHS = [1, 4, 3, 1, 1, 2]
NAMES = ["llama", "gemma2", "gpt2", "opt"]

Tiny = Callable[[str], TinyBundle]


@torch.no_grad()
def deferred(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Tokens after exits at DEPTHS that leave no trace in the caches: without any cache."""
    layers = decoder_layers(model)
    tokens: list[int] = []
    for number in range(count):
        depth = DEPTHS[(number - 1) % len(DEPTHS)] if number else len(layers)
        # all tokens run as deep as the newest one
        with exiting(layers, Forced([depth]), range(len(prompt) + number)):
            logits = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("name", NAMES)
def test_one_pass_agrees_with_decoding(name: str, tiny_bundle: Tiny) -> None:
    model, _ = tiny_bundle(name)
    for rule in (None, Forced(DEPTHS), Stable(0.7, 1, 1), Stable(0.6, 2, 2)):
        decoded = greedy(model, PROMPT, 40, rule)
        assert assert_decoded(model, PROMPT, decoded.tokens, rule) == decoded.exit_layers
    tokens = deferred(model, PROMPT, 40)
    depths = assert_decoded(model, PROMPT, tokens, Forced(DEPTHS), "defer")
    assert depths == [4, *(DEPTHS[n % len(DEPTHS)] for n in range(39))]


@pytest.mark.parametrize("place", [0, 20, 39])
def test_any_wrong_token_fails(place: int, tiny_bundle: Tiny) -> None:
    model, _ = tiny_bundle("llama")
    tokens = greedy(model, PROMPT, 40).tokens
    tokens[place] = (tokens[place] + 1) % 256
    with pytest.raises(AssertionError, match=f"token {place} is"):
        assert_decoded(model, PROMPT, tokens)


@pytest.mark.parametrize(
    ("rule", "kv_fill"),
    [(None, "propagate"), (Forced([1, 4, 3, 1, 2, 2]), "propagate"), (Forced(DEPTHS), "defer")],
)
def test_other_exits_or_another_fill_fail(
    rule: Forced | None, kv_fill: KvFill, tiny_bundle: Tiny
) -> None:
    model, _ = tiny_bundle("llama")
    tokens = greedy(model, PROMPT, 40, Forced(DEPTHS)).tokens
    with pytest.raises(AssertionError, match="is behind by"):
        assert_decoded(model, PROMPT, tokens, rule, kv_fill)


def test_ties_prove_nothing(tiny_bundle: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_bundle("llama")
    monkeypatch.setattr(model.lm_head, "forward", lambda x: torch.zeros(*x.shape[:-1], 256))
    with pytest.raises(AssertionError):
        assert_decoded(model, PROMPT, [0] * 8)
