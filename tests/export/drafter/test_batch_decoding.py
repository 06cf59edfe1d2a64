"""Texts that are written many at once: those that transformers' `generate` writes."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from sedac_export.drafter.batch_decoding import write_texts

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}
PROMPTS = [[5], [7, 8, 9, 10, 11, 12], [3, 4, 5]]
MOST = 24


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def _mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6))


def _gemma() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=6))


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=48, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
        )
    )


def _made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = {"llama": _llama, "mistral": _mistral, "gemma": _gemma, "gpt2": _gpt2}[name]()
    return model.eval().requires_grad_(False)


def _alone(model: PreTrainedModel, prompt: list[int], most: int = MOST) -> list[int]:
    """What the model writes after `prompt` with nothing beside it."""
    tokens = torch.tensor([prompt])
    written = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return written[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma", "gpt2"])
def test_greedy_texts_are_those_of_each_prompt_alone(name: str) -> None:
    model = _made(name)
    texts = write_texts(model, PROMPTS, MOST, 0.0, [48])
    assert texts == [_alone(model, prompt) for prompt in PROMPTS]
    assert len({tuple(text) for text in texts}) > 1


@pytest.mark.parametrize("most", [1, 2, MOST])
def test_texts_end_with_an_end_or_with_the_most_tokens(most: int) -> None:
    model = _made("llama")
    whole = _alone(model, PROMPTS[0])
    ends = [whole[4], 48]
    cut = whole[: whole.index(whole[4]) + 1]
    assert len(cut) < MOST
    texts = write_texts(model, [PROMPTS[0]], most, 0.0, ends)
    assert texts == [cut[:most]]


def test_sampled_texts_have_the_models_probabilities() -> None:
    model, texts = _made("llama"), 4096
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[2]])).logits[0, -1]
    wanted = (logits / 0.7).softmax(-1)
    torch.manual_seed(1)
    first = [text[0] for text in write_texts(model, [PROMPTS[2]] * texts, 2, 0.7, [48])]
    counts = torch.bincount(torch.tensor(first), minlength=48) / texts
    # five standard deviations of a share
    assert ((counts - wanted).abs() < 5 * (wanted * (1 - wanted) / texts).sqrt() + 1e-3).all()
    assert wanted.max() < 0.9
