"""The chain gives the tokens that transformers gives: at full depth and with exits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import THREADS, TinyBundle
from eager import Forced, Stable, assert_decoded
from tiny_models import ARCHITECTURES
from transformers import AutoTokenizer, PreTrainedModel

from sedac_runtime import SedacModel

NEW_TOKENS = 128
DEMO_PROMPTS = (
    "def fibonacci(n):\n",
    "import os\nimport sys\n\n",
    "class Stack:\n    def __init__(self):\n",
    "# Grüße, 你好 🙂\nname = '",
    "for i in range(10):\n    print(",
    "try:\n    with open(path) as f:\n",
    "    return self._cache[key]\n\n    def ",
    "x",
)


def random_prompts(vocabulary: int, count: int) -> list[list[int]]:
    """Prompts of 1 to 100 random tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = [1, *torch.randint(2, 100, (count - 1,), generator=generator).tolist()]
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_depth_equals_transformers(
    name: str, tiny_bundle: Callable[[str], TinyBundle]
) -> None:
    reference, bundle = tiny_bundle(name)
    model = SedacModel.from_pretrained(bundle, threads=THREADS)
    for prompt in random_prompts(256, 8):
        output = model.generate(prompt, mode="full", max_new_tokens=NEW_TOKENS)
        assert len(output.tokens) == NEW_TOKENS
        assert output.exit_layers == assert_decoded(reference, prompt, output.tokens)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forced_exits_equal_eager_with_the_same_fill(
    name: str, tiny_bundle: Callable[[str], TinyBundle]
) -> None:
    reference, bundle = tiny_bundle(name)
    model = SedacModel.from_pretrained(bundle, threads=THREADS)
    prompt = random_prompts(256, 2)[1]
    for exits in ([1], [2], [3], [1, 4, 3, 1, 1, 2]):
        output = model.generate(prompt, forced_exit=exits, max_new_tokens=64)
        depths = assert_decoded(reference, prompt, output.tokens, Forced(exits))
        assert output.exit_layers == depths
        assert depths == [4, *(exits[n % len(exits)] for n in range(63))]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_deferred_exits_leave_the_caches_of_full_depth(
    name: str, tiny_bundle: Callable[[str], TinyBundle]
) -> None:
    reference, bundle = tiny_bundle(name)
    model = SedacModel.from_pretrained(bundle, threads=THREADS)
    prompt = random_prompts(256, 2)[1]
    for exits in ([2], [1, 4, 3, 1, 1, 2]):
        output = model.generate(prompt, forced_exit=exits, kv_fill="defer", max_new_tokens=32)
        assert len(output.tokens) == 32
        depths = assert_decoded(reference, prompt, output.tokens, Forced(exits), "defer")
        assert (output.exit_layers, output.kv_fill) == (depths, "defer")


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("drafter", ["early-exit", "prompt-lookup", "auto"])
def test_lossless_equals_transformers(
    drafter: str, name: str, tiny_bundle: Callable[[str], TinyBundle]
) -> None:
    reference, bundle = tiny_bundle(name)
    model = SedacModel.from_pretrained(bundle, threads=THREADS)
    for prompt in random_prompts(256, 3):
        # a text with something to look up
        prompt = prompt[:30] * 3
        output = model.generate(prompt, mode="lossless", drafter=drafter, max_new_tokens=64)
        assert_decoded(reference, prompt, output.tokens)
        assert output.exit_layers == [4] * 64


@pytest.mark.parametrize("drafter", ["early-exit", "prompt-lookup", "auto"])
def test_demo_lossless_equals_full_depth(drafter: str, demo_model: SedacModel) -> None:
    drafted = accepted = 0
    for prompt in DEMO_PROMPTS:
        for settings in ({}, {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}):
            wanted = {"max_new_tokens": NEW_TOKENS, "stop_tokens": [], "seed": 3, **settings}
            full = demo_model.generate(prompt, mode="full", **wanted)
            lossless = demo_model.generate(prompt, mode="lossless", drafter=drafter, **wanted)
            assert lossless.tokens == full.tokens
            assert lossless.finish_reason == full.finish_reason
            assert lossless.verify_passes == sum(lossless.draft_depths.values())
            drafted += lossless.drafted
            accepted += lossless.accepted
    # text of programs repeats itself, and the demo model was trained to exit
    assert 0 < accepted <= drafted


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_an_unreachable_tau_is_full_depth(
    name: str, tiny_bundle: Callable[[str], TinyBundle]
) -> None:
    model = SedacModel.from_pretrained(tiny_bundle(name)[1], threads=THREADS)
    for prompt in random_prompts(256, 4):
        full = model.generate(prompt, mode="full", max_new_tokens=32)
        never = model.generate(prompt, mode="exit", tau=2.0, max_new_tokens=32)
        assert never.tokens == full.tokens
        assert never.exit_reasons == ["full_depth"] * 32


@pytest.mark.parametrize("prompt", DEMO_PROMPTS)
def test_demo_equals_transformers(
    prompt: str, demo_model: SedacModel, demo_reference: PreTrainedModel
) -> None:
    tokens = demo_model.encode(prompt)
    for exits in (None, [1], [6], [11]):
        output = demo_model.generate(
            tokens, mode="full", forced_exit=exits, max_new_tokens=NEW_TOKENS, stop_tokens=[]
        )
        rule = Forced(exits) if exits else None
        depths = assert_decoded(demo_reference, tokens, output.tokens, rule)
        assert output.exit_layers == depths
        assert len(depths) == NEW_TOKENS


@pytest.mark.parametrize(("tau", "k"), [(0.99, 3), (0.98, 2), (0.95, 1)])
def test_demo_exits_where_the_eager_policy_exits(
    tau: float, k: int, demo_model: SedacModel, demo_reference: PreTrainedModel
) -> None:
    tokens = demo_model.encode(DEMO_PROMPTS[2])
    output = demo_model.generate(
        tokens,
        mode="exit",
        tau=tau,
        consecutive_k=k,
        min_layer_ratio=0.2,
        max_new_tokens=64,
        stop_tokens=[],
    )
    depths = assert_decoded(demo_reference, tokens, output.tokens, Stable(tau, k, min_depth=3))
    assert output.exit_layers == depths
    assert len(depths) == 64
    assert len(set(output.exit_layers)) > 2


def test_both_sides_tokenize_alike(demo_model: SedacModel, demo_bundle: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_bundle)
    for prompt in DEMO_PROMPTS:
        assert demo_model.encode(prompt) == tokenizer(prompt)["input_ids"]
        assert demo_model.decode(demo_model.encode(prompt)) == prompt
