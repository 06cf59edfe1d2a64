"""The graphs that TensorRT gets: what they hold, and that they compute what the model does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, save_tiny_model

from sedac_export import BuildRequest, SedacError, build_bundle
from sedac_export.bundle.agreement_row import GATES
from sedac_export.bundle.manifest import Manifest, read_manifest
from sedac_export.bundle.portable_runner import PortableRunner
from sedac_export.device_graphs.agreement import compare, visible
from sedac_export.model.skeleton import Skeleton
from sedac_export.tensorrt.portable_writer import add_portable_graphs
from sedac_export.tensorrt.structure import expectations
from sedac_export.tensorrt.worker import Worker

from .conftest import RTX, PortableTiny, require_rtx

LAYER = "onnx/portable_layer_000.onnx"


def disagreements(directory: Path, manifest: Manifest) -> list[object]:
    assert manifest.portable is not None
    runner = PortableRunner(directory, manifest.device_precision())
    gates = GATES[runner.computes]
    # highest logits of random weights are as close as some roundings of fp16 move them: 0.0022 to
    # 0.0037, relatively, in three of 208 positions on a CPU without AVX-512, where ONNX Runtime's
    # own sums round differently
    gates = replace(gates, epsilon=4 * gates.epsilon)
    rows = compare(directory, manifest, manifest.portable, runner, gates)
    assert rows[-1]["engine"] == "end to end"
    return [row for row in rows if not row["passed"]]


@pytest.mark.rotating
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_parses_and_agrees(name: str, portable_tiny: PortableTiny) -> None:
    """In fp16; what TensorRT drops silently or does not know is in no graph."""
    directory, manifest = portable_tiny(name, "fp16")
    portable = manifest.portable
    assert portable is not None
    for file in portable.files():
        graph = onnx.load(directory / file, load_external_data=False).graph
        assert {node.domain for node in graph.node} <= {""}
        # the seventh input of Attention is nonpad_kv_seqlen, the fifth and sixth past and present
        inputs = [len(node.input) for node in graph.node if node.op_type == "Attention"]
        # Gemma 2 caps its scores, for which there is no operator
        assert inputs == [4] * ("layer_" in file and name != "gemma2")
    with Worker(RTX) as worker:
        for file, expected in expectations(directory, manifest, portable).items():
            assert expected.problems(worker.call("describe", graph=str(directory / file))) == []
    assert disagreements(directory, manifest) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_agree(precision: str, portable_tiny: PortableTiny) -> None:
    """Weights, residual stream and caches are in the precision, stability in fp32."""
    directory, manifest = portable_tiny("llama", precision)
    assert disagreements(directory, manifest) == []
    graph = onnx.load(directory / LAYER, load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.output}
    expected = {"fp32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16}[precision]
    assert types.pop("stability") == TensorProto.FLOAT
    assert set(types.values()) == {expected}
    assert {i.data_type for i in graph.initializer if i.external_data} == {expected}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_int4_weights_are_dequantized_in_the_graph(name: str, portable_tiny: PortableTiny) -> None:
    """Matrices that lie by rows and by columns, tied ones; the numbers are those of the CPU."""
    directory, manifest = portable_tiny(name, "int4")
    assert manifest.portable is not None
    assert disagreements(directory, manifest) == []
    half = TensorProto.FLOAT16
    for file in (LAYER, manifest.portable.head):
        graph = onnx.load(directory / file, load_external_data=False).graph
        assert {node.domain for node in graph.node} == {""}
        blocks = [node for node in graph.node if node.op_type == "DequantizeLinear"]
        kinds = {i.name: (i.data_type, len(i.dims)) for i in graph.initializer if i.external_data}
        matrices = [name for name, found in kinds.items() if found == (TensorProto.INT4, 2)]
        assert sorted(node.input[0] for node in blocks) == sorted(matrices) != []
        scales = [node.input[1] for node in blocks]
        assert {kinds[name] for name in scales} == {(half, 2)}
        assert {kinds[name] for name in kinds.keys() - {*matrices, *scales}} <= {(half, 1)}
    # each once: the blocks, half of the scales' bytes, and the embedding in fp16
    stored = (directory / "onnx" / "portable.data").stat().st_size
    own = sum(path.stat().st_size for path in (directory / "onnx").glob("*.data")) - stored
    assert stored < own + 2 * 320 * 64
    assert "onnx/portable.data" in read_manifest(directory).files
    require_rtx()
    with Worker(RTX) as worker:
        for file, expected in expectations(directory, manifest, manifest.portable).items():
            assert expected.problems(worker.call("describe", graph=str(directory / file))) == []


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model", intermediate_size=80)
    request = BuildRequest(str(tmp_path / "model"), tmp_path / "bundle", "int4")
    manifest = build_bundle(request).manifest
    before = sorted((tmp_path / "bundle" / "onnx").iterdir())
    with pytest.raises(SedacError, match=r"rows of 80 numbers.*--block-size that divides 80"):
        skeleton = Skeleton.load(tmp_path / "model")
        add_portable_graphs(tmp_path / "bundle", manifest, skeleton, lambda *_: None)
    assert sorted((tmp_path / "bundle" / "onnx").iterdir()) == before


def test_scales_that_fp16_cannot_hold_are_refused(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] *= 1e7
    save_file(weights, file, metadata={"format": "pt"})
    request = BuildRequest(str(tmp_path / "model"), tmp_path / "bundle", "int4")
    manifest = build_bundle(request).manifest
    with pytest.raises(SedacError, match=r"lm_head.* beyond the range of fp16"):
        skeleton = Skeleton.load(tmp_path / "model")
        add_portable_graphs(tmp_path / "bundle", manifest, skeleton, lambda *_: None)


def test_blocks_with_several_windows_agree(portable_tiny: PortableTiny) -> None:
    """Gemma 2 alternates: a block of two layers takes a mask for each."""
    directory, manifest = portable_tiny("gemma2", "fp32", layers_per_engine=2)
    assert manifest.portable is not None
    assert manifest.portable.masks == {"mask": 0, "mask_window_9": 9}
    assert [entry.masks for entry in manifest.portable.layers] == [["mask", "mask_window_9"]] * 2
    assert disagreements(directory, manifest) == []


def test_sequences_of_a_batch_do_not_mix(portable_tiny: PortableTiny) -> None:
    """Two sequences of different lengths in one pass give what each gives alone."""
    directory, manifest = portable_tiny("llama", "fp32")
    run = PortableRunner(directory, "fp32")
    rng = np.random.default_rng(0)
    starts, tokens, length = (3, 40), 5, manifest.max_cache_length
    feeds = {
        "x": rng.standard_normal((2, tokens, 64)),
        "past_key_0": rng.standard_normal((2, 2, length, 16)),
        "past_value_0": rng.standard_normal((2, 2, length, 16)),
    }
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    positions = np.stack([np.arange(start, start + tokens) for start in starts])
    assert manifest.portable is not None
    assert manifest.portable.contexts_graph is not None
    feeds |= run(manifest.portable.contexts_graph, {"position_ids": positions})
    masks = [visible(slice(start, start + tokens), length, 0) for start in starts]
    feeds |= {"mask": np.concatenate(masks), "write_index": np.array(starts, np.int64)}
    together = run(LAYER, feeds)
    for row in range(2):
        alone = run(LAYER, {name: array[row : row + 1] for name, array in feeds.items()})
        for name, array in alone.items():
            np.testing.assert_allclose(together[name][row : row + 1], array, atol=1e-5)


def test_masks_show_a_token_itself_and_what_is_before_it() -> None:
    mask = visible(slice(2, 4), 5, 0)[0, 0]
    assert mask.tolist() == [[True, True, True, False, False], [True, True, True, True, False]]
    mask = visible(slice(2, 4), 5, 2)[0, 0]
    assert mask.tolist() == [[False, True, True, False, False], [False, False, True, True, False]]


def test_weights_are_those_of_the_bundle(portable_tiny: PortableTiny) -> None:
    directory, manifest = portable_tiny("llama", "fp32")
    data = {path.name for path in (directory / "onnx").glob("*.data")}
    layers = {f"layer_00{i}.data" for i in range(4)}
    # the last is of the engines for the CPU
    assert data == {"embed.data", *layers, "head.data", "rotary.data"}
    assert read_manifest(directory).portable == manifest.portable
