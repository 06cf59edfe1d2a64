"""How probable the tokens of an echoed prompt are."""

from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI
from openai.types import Completion
from openai.types.completion_choice import Logprobs
from transformers import PreTrainedModel

from sedac_runtime import SedacModel
from serve.running_server import RunningServer

# longer than a chunk of prefill
PROMPT = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n" * 3
SCORED: dict[str, Any] = {
    "model": "chat",
    "prompt": PROMPT,
    "temperature": 0,
    "max_tokens": 4,
    "echo": True,
    "logprobs": 3,
}


def logprobs_of(completion: Completion, choice: int = 0) -> Logprobs:
    logprobs = completion.choices[choice].logprobs
    assert logprobs is not None
    return logprobs


def assert_same(ours: Any, others: Any) -> None:
    """Fields of two texts' Logprobs, or parts of them, are the same up to rounding.

    Passes over other numbers of tokens give other bits on some CPUs, and how many tokens share one
    depends on measured times.
    """
    for field in ("tokens", "text_offset"):
        assert getattr(ours, field) == getattr(others, field)
    assert ours.token_logprobs == pytest.approx(others.token_logprobs, abs=1e-4)
    for tops, of_others in zip(ours.top_logprobs, others.top_logprobs, strict=True):
        assert tops == (of_others and pytest.approx(of_others, abs=1e-4))


def log_softmax(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """What transformers gives: log probabilities of the tokens after each position."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("mode", ["lossless", "exit"])
def test_a_prompt_is_scored_as_transformers_does(
    client: OpenAI, demo_model: SedacModel, demo_reference: PreTrainedModel, mode: str
) -> None:
    options = {"mode": mode, "tau": 0.5} if mode == "exit" else {"mode": mode}
    logprobs = logprobs_of(client.completions.create(**SCORED, extra_body={"sedac": options}))
    tokens = demo_model.encode(PROMPT)
    expected = log_softmax(demo_reference, tokens)[:-1]
    assert logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    ours = torch.tensor(logprobs.token_logprobs[1 : len(tokens)])
    chosen = expected.gather(1, torch.tensor(tokens)[1:, None])[:, 0]
    assert torch.allclose(ours, chosen, atol=1e-2)
    most_probable = torch.tensor(
        [max(top.values()) for top in logprobs.top_logprobs[1 : len(tokens)]]
    )
    assert torch.allclose(most_probable, expected.max(-1).values, atol=1e-2)
    assert len(logprobs.token_logprobs) == len(tokens) + 4


def test_offsets_are_of_the_echoed_text(client: OpenAI) -> None:
    completion = client.completions.create(**SCORED)
    logprobs, text = logprobs_of(completion), completion.choices[0].text
    assert logprobs.tokens is not None and logprobs.text_offset is not None
    assert text.startswith(PROMPT) and len(text) > len(PROMPT)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert text.startswith(token, offset)


def test_a_prompt_alone_is_scored(client: OpenAI, demo_model: SedacModel) -> None:
    both = logprobs_of(client.completions.create(**SCORED))
    tokens = demo_model.encode(PROMPT)
    for prompt in (PROMPT, tokens):
        alone = client.completions.create(**SCORED | {"max_tokens": 0, "prompt": prompt})
        assert alone.choices[0].text == PROMPT
        assert alone.choices[0].finish_reason == "length"
        assert alone.usage is not None
        assert (alone.usage.prompt_tokens, alone.usage.completion_tokens) == (len(tokens), 0)
        fields = both.model_dump(exclude_none=True).items()
        assert_same(
            logprobs_of(alone), Logprobs.model_construct(**{k: v[: len(tokens)] for k, v in fields})
        )


@pytest.mark.parametrize(("length", "tokens"), [(-1, 2), (0, 1)])
def test_a_text_may_fill_the_cache(
    client: OpenAI, demo_model: SedacModel, length: int, tokens: int
) -> None:
    prompt = (demo_model.encode(PROMPT) * 50)[: demo_model.core.max_cache_length + length]
    request = {"model": "bundle", "temperature": 0, "max_tokens": 4}
    answer = client.completions.create(prompt=prompt, **request)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == tokens
    assert len(demo_model.generate(prompt, max_new_tokens=4).tokens) == tokens


def test_a_prompt_alone_may_fill_the_cache(client: OpenAI, demo_model: SedacModel) -> None:
    prompt = (demo_model.encode(PROMPT) * 50)[: demo_model.core.max_cache_length]
    scored = client.completions.create(**SCORED | {"max_tokens": 0, "prompt": prompt})
    assert len(logprobs_of(scored).tokens or ()) == len(prompt)


def test_a_prompt_of_one_token_has_no_logprob(client: OpenAI) -> None:
    for most_tokens in (0, 1):
        scored = client.completions.create(**SCORED | {"max_tokens": most_tokens, "prompt": [5]})
        token_logprobs = logprobs_of(scored).token_logprobs
        assert token_logprobs is not None
        assert token_logprobs[0] is None and len(token_logprobs) == 1 + most_tokens


def test_several_prompts_are_scored(client: OpenAI) -> None:
    prompts = [PROMPT, "def main():\n", PROMPT]
    together = client.completions.create(**SCORED | {"prompt": prompts})
    assert_same(logprobs_of(together, 0), logprobs_of(together, 2))
    alone = client.completions.create(**SCORED | {"prompt": prompts[1]})
    assert logprobs_of(together, 1).tokens == logprobs_of(alone).tokens


def test_scores_stream(client: OpenAI) -> None:
    whole = client.completions.create(**SCORED)
    pieces = list(client.completions.create(**SCORED, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    joined = {
        field: [entry for piece in pieces for entry in getattr(logprobs_of(piece), field)]
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    assert_same(Logprobs.model_construct(**joined), logprobs_of(whole))


def test_nothing_is_left_of_a_prompt_with_neither_echo_nor_tokens(server: RunningServer) -> None:
    request = SCORED | {"max_tokens": 0, "echo": False}
    response = httpx.post(f"{server.url}/v1/completions", json=request)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_tokens"
