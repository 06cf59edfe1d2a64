"""Texts that are written many at once: those that transformers' `generate` writes."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from sedac_export.drafter.batch_decoding import _Batch, write_texts

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
# no token
NO_END = 48
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


def _gpt_neo() -> PreTrainedModel:
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=48,
            max_position_embeddings=64,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=6,
            initializer_range=0.3,
        )
    )


# those of a static cache, two with windows; the last has caches that grow
FIXED = {"llama": _llama, "mistral": _mistral, "gemma": _gemma, "gpt2": _gpt2}
MODELS = FIXED | {"gpt-neo": _gpt_neo}


def _made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval().requires_grad_(False)


def _alone(model: PreTrainedModel, prompt: list[int], most: int = MOST) -> list[int]:
    """What the model writes after `prompt` with nothing beside it."""
    tokens = torch.tensor([prompt], device=model.device)
    written = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return written[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_texts_are_those_of_each_prompt_alone(name: str) -> None:
    model = _made(name)
    texts = write_texts(model, PROMPTS, MOST, 0.0, [NO_END])
    assert texts == [_alone(model, prompt) for prompt in PROMPTS]
    assert len({tuple(text) for text in texts}) > 1


@pytest.mark.parametrize("name", FIXED)
def test_a_step_changes_nothing_on_the_host(name: str) -> None:
    """What it would change, a graph would not."""
    batch = _Batch(_made(name), PROMPTS, MOST, 0.0, [NO_END])
    assert batch.is_fixed

    def on_host() -> list[dict[str, Any]]:
        layers = [vars(layer) for layer in batch.cache.layers]
        return [{k: v for k, v in of.items() if not isinstance(v, torch.Tensor)} for of in layers]

    before = copy.deepcopy(on_host())
    batch.step()
    assert on_host() == before


@pytest.mark.gpu
@pytest.mark.parametrize("name", FIXED)
def test_a_graph_writes_the_same_texts(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no NVIDIA GPU")
    model: Any = _made(name)
    model.to("cuda")
    texts = write_texts(model, PROMPTS, MOST, 0.0, [NO_END])
    assert texts == [_alone(model, prompt) for prompt in PROMPTS]
    sampled = write_texts(model, [PROMPTS[2]] * 64, MOST, 1.0, [NO_END])
    assert len({tuple(text) for text in sampled}) > 1
    assert any(len(set(text)) > 1 for text in sampled)


@pytest.mark.parametrize("most", [1, 2, MOST])
def test_texts_end_with_an_end_or_with_the_most_tokens(most: int) -> None:
    model = _made("llama")
    whole = _alone(model, PROMPTS[0])
    ends = [whole[4], NO_END]
    cut = whole[: whole.index(whole[4]) + 1]
    assert len(cut) < MOST
    texts = write_texts(model, [PROMPTS[0]], most, 0.0, ends)
    assert texts == [cut[:most]]


def test_sampled_texts_have_the_models_probabilities() -> None:
    model, texts = _made("llama"), 4096
    torch.manual_seed(1)
    written = torch.tensor(write_texts(model, [PROMPTS[2]] * texts, 2, 0.7, [NO_END]))
    frequent = int(written[:, 0].mode().values)
    after = written[written[:, 0] == frequent]
    for prompt, chosen in ((PROMPTS[2], written[:, 0]), ([*PROMPTS[2], frequent], after[:, 1])):
        logits = model(torch.tensor([prompt])).logits[0, -1]
        wanted = (logits / 0.7).softmax(-1)
        shares = torch.bincount(chosen, minlength=48) / len(chosen)
        # five standard deviations of a share
        bound = 5 * (wanted * (1 - wanted) / len(chosen)).sqrt() + 1e-3
        assert ((shares - wanted).abs() < bound).all()
        assert wanted.max() < 0.9
