"""The weights' file: every number of the model, at the place that the kernel reads it from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_model

from sedac_export import SedacError
from sedac_export.arrays import Array
from sedac_export.bundle import Bundle
from sedac_export.bundle.manifest import file_entry, read_manifest, write_manifest
from sedac_export.cuda.description import ChainDescription, describe
from sedac_export.cuda.packing import write_weights
from sedac_export.cuda.weight_blocks import HalfBlocks
from sedac_export.model.skeleton import Skeleton

from .conftest import HalfBundle, TinySkeleton

Weights = dict[str, torch.Tensor]


def packed(model: Path, bundle: Path) -> tuple[dict[str, Array], Weights, ChainDescription]:
    """The file of a bundle, the model's own weights in fp16, and the description."""
    with torch.no_grad():
        description = describe(Skeleton.load(model))
    path = bundle.with_name(f"{bundle.name}.safetensors")
    write_weights(path, Bundle.open(bundle), description, lambda *_: None)
    weights = load_model(model / "model.safetensors")
    return load_file(path), {name: w.half() for name, w in weights.items()}, description


def element(packed: Array, row: int, column: int) -> float:
    """An element of a packed matrix, by the layout's definition."""
    return float(packed[row // 16, column // 32, row % 16 // 8, row % 8, column % 32])


def plain(packed: Array) -> Array:
    """A packed matrix as [rows, columns]."""
    tiles, blocks = packed.shape[:2]
    elements = [
        [element(packed, row, column) for column in range(blocks * 32)] for row in range(tiles * 16)
    ]
    return np.array(elements, np.float16)


def test_bf16_keeps_its_numbers(half_bundle: HalfBundle) -> None:
    model, bundle = half_bundle("llama", "bf16")
    file, _, _ = packed(model, bundle)
    weights = {
        name: weight.bfloat16().float().numpy()
        for name, weight in load_model(model / "model.safetensors").items()
    }
    matrix = weights["model.layers.1.mlp.down_proj.weight"]
    stored = plain(file["layers.1.down"])
    exact = np.abs(matrix) >= 2**-17
    assert exact.mean() > 0.9
    np.testing.assert_array_equal(stored[exact], matrix[exact])
    np.testing.assert_allclose(stored, matrix, rtol=0, atol=2**-25)
    norm = weights["model.layers.1.input_layernorm.weight"]
    np.testing.assert_array_equal(file["layers.1.attention_norm"], norm)


def test_bf16_beyond_fp16_is_refused(half_bundle: HalfBundle) -> None:
    model, bundle = half_bundle("llama", "bf16")
    data = bundle / "onnx" / "layer_000.data"
    largest = np.full(data.stat().st_size // 2, 0x7F7F, np.uint16)  # 3.4e38
    data.write_bytes(largest.tobytes())
    manifest = read_manifest(bundle)
    files = manifest.files | {"onnx/layer_000.data": file_entry(bundle, "onnx/layer_000.data")}
    write_manifest(bundle, manifest.model_copy(update={"files": files}))
    with pytest.raises(SedacError, match=r"beyond the range of fp16.* leave the target out"):
        packed(model, bundle)


@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 96), (40, 64)])
def test_every_element_is_at_its_place(rows: int, columns: int) -> None:
    matrix = (np.arange(rows * columns) % 2048).astype(np.float32).reshape(rows, columns)
    result = HalfBlocks().pack({"": matrix})
    assert result.shape == (-(-rows // 16), columns // 32, 2, 8, 32)
    for row in range(result.shape[0] * 16):
        for column in range(columns):
            expected = matrix[row, column] if row < rows else 0
            assert element(result, row, column) == expected


def test_layers_are_those_of_the_model(half_bundle: HalfBundle) -> None:
    file, weights, _ = packed(*half_bundle("llama"))
    for layer in range(4):
        prefix = f"model.layers.{layer}."

        def joined(*names: str, kind: str = "weight", prefix: str = prefix) -> Array:
            return torch.cat([weights[f"{prefix}{name}.{kind}"] for name in names]).numpy()

        def own(name: str, layer: int = layer) -> Array:
            return file[f"layers.{layer}.{name}"]

        attention = [f"self_attn.{name}_proj" for name in "qkv"]
        np.testing.assert_array_equal(plain(own("qkv")), joined(*attention))
        np.testing.assert_array_equal(plain(own("o")), joined("self_attn.o_proj"))
        np.testing.assert_array_equal(plain(own("down")), joined("mlp.down_proj"))
        np.testing.assert_array_equal(own("qkv_bias"), joined(*attention, kind="bias"))
        np.testing.assert_array_equal(own("attention_norm"), joined("input_layernorm"))
        np.testing.assert_array_equal(own("mlp_norm"), joined("post_attention_layernorm"))
        gate_up, bias = plain(own("gate_up")), own("gate_up_bias")
        for kind, offset in (("gate", 0), ("up", 8)):
            matrix = joined(f"mlp.{kind}_proj")
            for row in range(96):
                place = row // 8 * 16 + offset + row % 8
                np.testing.assert_array_equal(gate_up[place], matrix[row])
                assert bias[place] == joined(f"mlp.{kind}_proj", kind="bias")[row]


def test_fused_products_are_packed_as_separate_ones(half_bundle: HalfBundle) -> None:
    file, weights, _ = packed(*half_bundle("phi3"))
    prefix = "model.layers.2."
    np.testing.assert_array_equal(
        plain(file["layers.2.qkv"]), weights[f"{prefix}self_attn.qkv_proj.weight"].numpy()
    )
    gate, up = weights[f"{prefix}mlp.gate_up_proj.weight"].numpy().reshape(2, 96, 64)
    gate_up = plain(file["layers.2.gate_up"]).reshape(12, 2, 8, 64)
    np.testing.assert_array_equal(gate_up[:, 0].reshape(96, 64), gate)
    np.testing.assert_array_equal(gate_up[:, 1].reshape(96, 64), up)


def test_embedding_and_head_are_one_matrix_where_they_are_tied(half_bundle: HalfBundle) -> None:
    tied, weights, _ = packed(*half_bundle("qwen2"))
    assert "embed" not in tied
    np.testing.assert_array_equal(plain(tied["head"]), weights["model.embed_tokens.weight"])
    untied, weights, _ = packed(*half_bundle("mistral"))
    np.testing.assert_array_equal(plain(untied["head"]), weights["lm_head.weight"])
    np.testing.assert_array_equal(plain(untied["embed"]), weights["model.embed_tokens.weight"])
    np.testing.assert_array_equal(untied["final_norm"], weights["model.norm.weight"].float())


def test_norms_hold_their_offset(half_bundle: HalfBundle) -> None:
    file, weights, _ = packed(*half_bundle("gemma2"))
    for name, source in (
        ("final_norm", "model.norm"),
        ("layers.1.mlp_norm", "model.layers.1.pre_feedforward_layernorm"),
        ("layers.3.attention_post_norm", "model.layers.3.post_attention_layernorm"),
    ):
        np.testing.assert_array_equal(file[name], weights[f"{source}.weight"].float() + 1)


def test_rotary_tables_are_the_models(half_bundle: HalfBundle) -> None:
    file, _, description = packed(*half_bundle("gemma3"))
    assert len(description.tables) == 2
    positions = np.arange(320)[:, None]
    for index, base in ((0, 1e4), (1, 1e6)):
        angles = positions * base ** (-np.arange(8) / 8)
        np.testing.assert_allclose(file[f"rotary.{index}.cos"], np.cos(angles), atol=1e-4)
        np.testing.assert_allclose(file[f"rotary.{index}.sin"], np.sin(angles), atol=1e-4)


@pytest.mark.rotating
@pytest.mark.parametrize("name", ["smollm3"])
def test_layers_that_rotate_nothing_have_tables_that_do_not(
    name: str, half_bundle: HalfBundle
) -> None:
    file, _, description = packed(*half_bundle(name))
    index = description.layers[1].rotary
    np.testing.assert_array_equal(file[f"rotary.{index}.cos"], np.ones((320, 8)))
    np.testing.assert_array_equal(file[f"rotary.{index}.sin"], np.zeros((320, 8)))


@pytest.mark.parametrize("other", ["qwen3", "phi3", "gemma3"])
def test_a_bundle_of_another_model_is_refused(
    other: str, half_bundle: HalfBundle, tiny_skeleton: TinySkeleton, tmp_path: Path
) -> None:
    bundle = Bundle.open(half_bundle("mistral")[1])
    description = describe(tiny_skeleton(other))
    with pytest.raises(SedacError, match="name the model that the bundle was built from"):
        write_weights(tmp_path / "weights", bundle, description, lambda *_: None)
