"""Exits inside PyTorch: the same as decoding one token at a time, and gone when it ends."""

import inspect
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import THREADS
from eager import Stable, assert_decoded, greedy
from tiny_models import ARCHITECTURES, save_tiny_model
from transformers import DynamicCache, PreTrainedModel

from sedac_export.bundle import Bundle
from sedac_export.bundle.exit_config import ExitConfig
from sedac_export.errors import SedacError
from sedac_export.exits.replay.replay import Replay
from sedac_export.model.decoder import cache_argument
from sedac_export.pytorch.accelerator import create_universal_accelerator
from sedac_runtime import SedacModel

PROMPT = "class Stack:\n    def push(self, item):\n"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generate_gives_what_decoding_by_hand_gives(name: str, tmp_path: Path) -> None:
    model = save_tiny_model(name, tmp_path)
    prompt = list(range(5, 25))
    with create_universal_accelerator(model, 0.7, 1, min_layer_ratio=0.25):
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
    tokens = output[0, len(prompt) :].tolist()
    assert len(tokens) == 24
    depths = assert_decoded(model, prompt, tokens, Stable(0.7, 1, min_depth=1))
    assert min(depths) < 4


def test_one_pass_exits_where_decoding_does(
    demo_model: SedacModel, demo_reference: PreTrainedModel
) -> None:
    prompt = demo_model.encode(PROMPT)
    decoded = greedy(demo_reference, prompt, 60, Stable(0.98, 2, min_depth=3))
    with create_universal_accelerator(demo_reference) as accelerator:
        generated = demo_reference.generate(
            torch.tensor([prompt]), max_new_tokens=60, do_sample=False, pad_token_id=0
        )
        assert generated[0, len(prompt) :].tolist() == decoded.tokens
        assert accelerator.stats().mean_exit_layer < 12
        assert accelerator.stats().tokens == len(prompt) + 59


def test_a_direct_call_equals_the_replayed_chain(
    demo_bundle: Path, demo_model: SedacModel, demo_reference: PreTrainedModel
) -> None:
    tokens = demo_model.encode(PROMPT * 12)
    config = ExitConfig(tau=0.98, consecutive_k=2)
    replay = Replay(Bundle.open(demo_bundle), THREADS)
    trace = replay.run(np.array(tokens), config.policy_settings())
    with torch.no_grad(), create_universal_accelerator(demo_reference, config=config) as exits:
        logits = demo_reference(torch.tensor([tokens])).logits[0]
    assert exits.stats().last_depths == trace.depths.tolist()
    assert logits.argmax(-1).tolist() == trace.tokens.tolist()
    assert len(set(trace.depths)) > 3


def test_the_model_is_as_before_after_an_error(demo_reference: PreTrainedModel) -> None:
    tokens = torch.arange(40)[None]
    before = demo_reference(tokens).logits
    with pytest.raises(RuntimeError, match="stop"), create_universal_accelerator(demo_reference):
        demo_reference(tokens)
        raise RuntimeError("stop")
    assert torch.equal(demo_reference(tokens).logits, before)
    assert "generate" not in vars(demo_reference)
    assert not any("forward" in vars(module) for module in demo_reference.modules())
    assert not any(module._forward_hooks for module in demo_reference.modules())


def test_a_batch_exits_row_by_row(demo_reference: PreTrainedModel) -> None:
    tokens = torch.stack([torch.arange(1, 33), torch.arange(60, 92)])
    with torch.no_grad(), create_universal_accelerator(demo_reference, 0.97, 1) as both:
        together = demo_reference(tokens).logits
    depths = []
    for row, logits in zip(tokens, together, strict=True):
        with torch.no_grad(), create_universal_accelerator(demo_reference, 0.97, 1) as one:
            alone = demo_reference(row[None]).logits[0]
        depths += one.stats().last_depths
        assert torch.allclose(alone, logits, atol=1e-4)
    assert both.stats().last_depths == depths


def test_environment_sets_the_defaults(
    demo_reference: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.arange(1, 40)[None]
    with create_universal_accelerator(demo_reference, 0.9, 1, min_layer_ratio=0.5) as asked:
        demo_reference(tokens)
    for name, value in (("TAU", "0.9"), ("K", "1"), ("MIN_LAYER", "6")):
        monkeypatch.setenv(f"SEDAC_V7_{name}", value)
    with create_universal_accelerator(demo_reference) as by_environment:
        demo_reference(tokens)
    assert by_environment.stats() == asked.stats()
    assert min(asked.stats().depths) == 6
    monkeypatch.setenv("SEDAC_V7_TAU", "high")
    with pytest.raises(SedacError, match="SEDAC_V7_TAU high"):
        create_universal_accelerator(demo_reference)


def test_settings_out_of_range_are_refused(demo_reference: PreTrainedModel) -> None:
    with pytest.raises(SedacError, match="out of range"):
        create_universal_accelerator(demo_reference, -1.0)
    for depth in (0, 99):
        with pytest.raises(SedacError, match=f"exit_layers: depth {depth} is out of range: 1 to"):
            create_universal_accelerator(demo_reference, exit_layers=[6, depth])
    with pytest.raises(SedacError, match="kv_fill x is unknown: propagate, defer"):
        create_universal_accelerator(demo_reference, kv_fill="x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "part"), [("probe", "an entropy probe"), ("learned", "an exit engine")]
)
def test_probes_that_are_missing_are_named_before_the_first_pass(
    demo_reference: PreTrainedModel, policy: Literal["probe", "learned"], part: str
) -> None:
    config = ExitConfig(policy=policy, thresholds={6: 0.9})
    with pytest.raises(SedacError, match=f"needs {part} at depth 6: pass bundle="):
        create_universal_accelerator(demo_reference, config=config)


def test_no_exit_layers_are_none(demo_reference: PreTrainedModel) -> None:
    with create_universal_accelerator(demo_reference, 0.5, 1, exit_layers=[]) as accelerator:
        demo_reference(torch.arange(1, 40)[None])
    assert accelerator.stats().depths == {12: 39}


@pytest.mark.parametrize("settings", [{"use_cache": False}, {"prefill_chunk_size": 3}])
def test_passes_of_any_size_exit_alike(
    demo_reference: PreTrainedModel, settings: dict[str, Any]
) -> None:
    """The whole prompt runs at full depth, and no more than it."""
    prompt = torch.arange(1, 20)[None]
    asked: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 16, "pad_token_id": 0}
    with create_universal_accelerator(demo_reference, 0.9, 1) as usual:
        expected = demo_reference.generate(prompt, do_sample=False, **asked)
    with create_universal_accelerator(demo_reference, 0.9, 1) as accelerator:
        given = demo_reference.generate(prompt, do_sample=False, **asked, **settings)
    assert given.tolist() == expected.tolist()
    assert accelerator.stats().last_depths[-1] == usual.stats().last_depths[-1] < 12


def test_a_prompt_that_continues_a_cache_runs_at_full_depth(
    demo_reference: PreTrainedModel,
) -> None:
    cache, prompt = DynamicCache(), torch.arange(1, 40)[None]
    earlier = {cache_argument(inspect.signature(demo_reference.forward).parameters): cache}
    demo_reference(prompt[:, :20], **earlier)
    with create_universal_accelerator(demo_reference, 0.5, 1) as accelerator:
        demo_reference.generate(prompt, max_new_tokens=1, pad_token_id=0, **earlier)
    assert accelerator.stats().depths == {12: 19}
