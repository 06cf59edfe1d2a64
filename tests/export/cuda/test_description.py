"""Descriptions derived from models, and accepted only where they give the models' numbers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model
from torch import nn

from sedac_export.bundle.cuda_entry import ChainOptions
from sedac_export.cuda.description import (
    ChainDescription,
    check_ends,
    check_layer,
    describe,
)
from sedac_export.cuda.identification import NoChainError
from sedac_export.cuda.layer_weights import NormWeight, Rows
from sedac_export.cuda.observation import observing
from sedac_export.model.skeleton import Skeleton

from .conftest import TinySkeleton

NORMS = ["attention_norm", "mlp_norm"]
POST_NORMS = ["attention_post_norm", "mlp_post_norm"]
HEAD_NORMS = ["key_norm", "query_norm"]

# windows and rotary tables of the layers, norms and biases, and what of the options is unusual
DESCRIBED: dict[str, tuple[list[int], list[int], list[str], dict[str, Any]]] = {
    "llama": (
        [0] * 4,
        [0] * 4,
        [*NORMS, "down_bias", "gate_up_bias", "o_bias", "qkv_bias"],
        {},
    ),
    "qwen2": ([0] * 4, [0] * 4, [*NORMS, "qkv_bias"], {}),
    "qwen3": ([0] * 4, [0] * 4, [*NORMS, *HEAD_NORMS], {"attention_scale": 32**-0.5}),
    "mistral": ([9] * 4, [0] * 4, NORMS, {}),
    "phi3": ([0] * 4, [0] * 4, NORMS, {"norm_epsilon": 1e-5}),
    "phi3 with longrope": ([0] * 2, [0] * 2, NORMS, {"norm_epsilon": 1e-5}),
    "smollm3": ([0] * 2, [0, 1], NORMS, {}),
    "gemma2": (
        [9, 0, 9, 0],
        [0] * 4,
        [*NORMS, *POST_NORMS],
        {
            "activation": "gelu_tanh",
            "attention_scale": 24**-0.5,
            "attention_softcap": 5.0,
            "logits_softcap": 3.0,
            "embedding_scale": 8.0,
        },
    ),
    "gemma3": (
        [50, 0],
        [0, 1],
        [*NORMS, *POST_NORMS, *HEAD_NORMS],
        {"activation": "gelu_tanh", "attention_scale": 0.0625, "embedding_scale": 8.0},
    ),
}

REFUSED = {
    "gpt2": "ln_1 is a LayerNorm",
    "opt": "self_attn_layer_norm is a LayerNorm",
    "gpt_neox": "input_layernorm is a LayerNorm",
    "cohere": "input_layernorm is a CohereLayerNorm",
    "olmo2": "q_norm norms all heads together",
    "gemma4": "its queries, keys and values are not rotated products",
    "granite": "its layer 0 differs from the kernel's by",
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_model_is_described_by_its_numbers(name: str, tiny_skeleton: TinySkeleton) -> None:
    windows, rotary, vectors, unusual = DESCRIBED[name]
    description = describe(tiny_skeleton(name))
    shape = description.shape
    size = 32 if name == "qwen3" else 16
    assert [layer.window for layer in description.layers] == windows
    assert [layer.rotary for layer in description.layers] == rotary
    assert description.vectors() == sorted(vectors)
    usual = ChainOptions(
        activation="silu",
        norm_epsilon=1e-6,
        attention_scale=0.25,
        attention_softcap=0.0,
        logits_softcap=0.0,
        embedding_scale=1.0,
    )
    assert description.options == usual.model_copy(update=unusual)
    assert shape.model_dump() == {
        "hidden": 64,
        "heads": 4,
        "key_value_heads": 2,
        "head_size": size,
        "rotary_size": 8 if name == "phi3" else size,
        "intermediate": 96,
        "layers": len(windows),
        "vocabulary": 256,
    }
    assert description.final_norm_offset == (1.0 if name.startswith("gemma") else 0.0)


def test_fused_products_are_told_apart(tiny_skeleton: TinySkeleton) -> None:
    weights = describe(tiny_skeleton("phi3")).weights[0]
    fused, gated = "self_attn.qkv_proj", "mlp.gate_up_proj"
    assert weights.query == Rows(fused, 0, 64, False)
    assert weights.key == Rows(fused, 64, 96, False)
    assert weights.value == Rows(fused, 96, 128, False)
    assert weights.gate == Rows(gated, 0, 96, False)
    assert weights.up == Rows(gated, 96, 192, False)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_of_another_kind_is_refused(name: str, tiny_skeleton: TinySkeleton) -> None:
    with pytest.raises(NoChainError, match=REFUSED[name]):
        describe(tiny_skeleton(name))


def test_an_mlp_without_a_gate_is_refused(tmp_path: Path) -> None:
    save_tiny_model("qwen2", tmp_path)
    skeleton = Skeleton.load(tmp_path)
    for layer in skeleton.layers:
        layer.mlp = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64))
    with pytest.raises(NoChainError, match=r"its MLP is not gated$"):
        describe(skeleton)


def test_a_model_that_cannot_be_run_so_is_refused(tmp_path: Path) -> None:
    save_tiny_model("qwen2", tmp_path)
    skeleton = Skeleton.load(tmp_path)
    skeleton.model.lm_head = nn.Identity()
    with pytest.raises(NoChainError, match="its layers cannot be observed"):
        describe(skeleton)


def test_an_activation_that_the_kernel_lacks_is_refused(tmp_path: Path) -> None:
    save_tiny_model("qwen2", tmp_path, hidden_act="relu")
    with pytest.raises(NoChainError, match="not gated by SiLU or the tanh form of GELU"):
        describe(Skeleton.load(tmp_path))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"intermediate_size": 100}, "its MLP's size 100 is no multiple of 32"),
        ({"head_dim": 80}, "its heads are of 80 and not of 16, 32, 48, 64, 96, 128"),
        (
            {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 1},
            "12 heads share keys",
        ),
        ({"hidden_size": 72, "head_dim": 16}, "its hidden size 72 is no multiple of 32"),
    ],
)
def test_sizes_that_the_kernel_is_not_made_for_are_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    save_tiny_model("llama", tmp_path, num_hidden_layers=2, **({"head_dim": 16} | changes))
    with pytest.raises(NoChainError, match=reason):
        describe(Skeleton.load(tmp_path))


def with_options(description: ChainDescription, **changes: Any) -> ChainDescription:
    options = description.options.model_copy(update=changes)
    return replace(description, options=options)


def with_layers(description: ChainDescription, **changes: Any) -> ChainDescription:
    layers = [layer.model_copy(update=changes) for layer in description.layers]
    return replace(description, layers=layers)


def with_weights(description: ChainDescription, **changes: Any) -> ChainDescription:
    weights = [replace(layer, **changes) for layer in description.weights]
    return replace(description, weights=weights)


def wrong_descriptions(right: ChainDescription) -> dict[str, ChainDescription]:
    """Each wrong in one thing, and little."""
    weights, options = right.weights[0], right.options
    norms = weights.norms
    swapped = norms | {"mlp_norm": norms["attention_norm"]}
    shifted = norms | {"mlp_norm": NormWeight(norms["mlp_norm"].module, 1e-3)}
    return {
        "epsilon": with_options(right, norm_epsilon=options.norm_epsilon * 1.01),
        "scale": with_options(right, attention_scale=options.attention_scale * (1 + 1e-6)),
        "soft cap": with_options(right, attention_softcap=1000.0),
        "activation": with_options(right, activation="gelu_tanh"),
        "window": with_layers(right, window=23),
        "rotary": replace(right, tables=[None]),
        "gate and up": with_weights(right, gate=weights.up, up=weights.gate),
        "query and key": with_weights(right, key=weights.value, value=weights.key),
        "norms": with_weights(right, norms=swapped),
        "offset": with_weights(right, norms=shifted),
        "no norm": with_weights(right, norms={"mlp_norm": norms["mlp_norm"]}),
        "bias": with_weights(right, query=replace(weights.query, biased=False)),
    }


def test_a_wrong_description_of_a_layer_is_caught(tiny_skeleton: TinySkeleton) -> None:
    skeleton = tiny_skeleton("qwen2")
    right = describe(skeleton)
    with observing(skeleton) as observer:
        seen = observer.layer(0)
    check_layer(right, 0, seen)
    accepted = []
    for what, wrong in wrong_descriptions(right).items():
        try:
            check_layer(wrong, 0, seen)
            accepted.append(what)
        except NoChainError:
            pass
    assert accepted == []


@pytest.mark.parametrize(
    "changes",
    [{"embedding_scale": 8.0001}, {"logits_softcap": 3.001}, {"norm_epsilon": 1.01e-6}],
)
def test_a_wrong_description_of_embedding_or_head_is_caught(
    changes: dict[str, float], tiny_skeleton: TinySkeleton
) -> None:
    skeleton = tiny_skeleton("gemma2")
    right = describe(skeleton)
    with observing(skeleton) as observer:
        ends = observer.ends()
    check_ends(right, ends)
    with pytest.raises(NoChainError):
        check_ends(with_options(right, **changes), ends)
    with pytest.raises(NoChainError):
        check_ends(replace(right, final_norm_offset=0.0), ends)


def test_the_model_is_as_before(tiny_skeleton: TinySkeleton) -> None:
    skeleton = tiny_skeleton("mistral")
    implementation = skeleton.config._attn_implementation
    describe(skeleton)
    assert skeleton.config._attn_implementation == implementation
    assert all(weight.device.type == "meta" for weight in skeleton.model.parameters())
    assert not any(module._forward_hooks for module in skeleton.model.modules())
    assert torch.zeros(1).float().dtype == torch.float32
