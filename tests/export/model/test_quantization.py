"""Quantized rows stand for the numbers that ONNX Runtime's kernels compute with."""

import logging

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sedac_export.errors import SedacError
from sedac_export.model.quantization import (
    Quantization,
    QuantizedRows,
    quantize,
    quantize_calibrated,
)

CASES = [
    Quantization(bits, block_size, symmetric)
    for bits in (4, 8)
    for block_size in (16, 32)
    for symmetric in (True, False)
]


def some_rows(columns: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, columns)).astype(np.float32)
    rows[1] = 0.0
    rows[2] += 3.0
    return rows


def run(nodes: list[onnx.NodeProto], tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", kind, [*x.shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


def parts(rows: QuantizedRows) -> dict[str, np.ndarray]:
    named = {"values": rows.values, "scales": rows.scales, "zero_points": rows.zero_points}
    return {name: value for name, value in named.items() if value is not None}


@pytest.mark.parametrize("columns", [64, 56])
@pytest.mark.parametrize("quantization", CASES, ids=str)
def test_rows_are_what_products_multiply_with(quantization: Quantization, columns: int) -> None:
    """The last block of 56 columns is padded. Products with the identity give the weights."""
    weight = some_rows(columns)
    rows = quantize(weight, quantization)
    tensors = parts(rows)
    node = helper.make_node(
        "MatMulNBits",
        ["x", *tensors],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=len(weight),
        bits=quantization.bits,
        block_size=quantization.block_size,
    )
    product = run([node], tensors, np.eye(columns, dtype=np.float32))
    dequantized = rows.dequantized(quantization, columns)
    np.testing.assert_allclose(dequantized, product.T, rtol=0, atol=1e-6)
    step = rows.scales.max() * (1.01 if quantization.bits == 4 else 1.5)
    assert np.abs(dequantized - weight).max() <= step


@pytest.mark.parametrize("quantization", CASES, ids=str)
def test_rows_are_what_embeddings_gather(quantization: Quantization) -> None:
    rows = quantize(some_rows(64), quantization)
    tensors = parts(rows)
    tensors["values"] = tensors["values"].reshape(len(rows.scales), -1)
    values, *others = tensors
    node = helper.make_node(
        "GatherBlockQuantized",
        [values, "x", *others],
        ["y"],
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=1,
        bits=quantization.bits,
        block_size=quantization.block_size,
    )
    gathered = run([node], tensors, np.array([5, 0, 2]))
    np.testing.assert_array_equal(gathered, rows.dequantized(quantization, 64)[[5, 0, 2]])


def test_scales_are_numbers_of_fp16_where_it_has_such() -> None:
    sizes = np.array([1.0, 1e3, 1e-7, 1e-30, 1e7, 0.0], dtype=np.float32)
    weight = np.random.default_rng(1).standard_normal((6, 32)).astype(np.float32) * sizes[:, None]
    scales = quantize(weight, Quantization(4)).scales[:, 0]
    with np.errstate(over="ignore"):
        in_fp16 = scales.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal((scales == in_fp16), [True, True, False, False, False, True])
    # others keep their digits
    np.testing.assert_allclose(np.abs(scales) * 8, np.abs(weight).max(axis=1), rtol=1e-3)


def test_blocks_that_no_kernel_takes_are_refused() -> None:
    with pytest.raises(SedacError, match="--block-size 48 is none of 16, 32, 64, 128, 256"):
        Quantization(4, block_size=48).check()


def test_the_library_leaves_logging_as_it_was() -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    quantize(some_rows(32), Quantization(4))
    assert (root.handlers, root.level) == before


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_calibrated_rows_change_outputs_less(bits: int, symmetric: bool) -> None:
    """On inputs whose numbers depend on each other, which is what calibration makes use of."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((56, 56)).astype(np.float32)
    x = rng.standard_normal((500, 56)).astype(np.float32) @ mixing
    weight = some_rows(56)
    quantization = Quantization(bits, 16, symmetric, "gptq")

    def error(rows: QuantizedRows) -> float:
        changed = rows.dequantized(quantization, 56) - weight
        return float(np.linalg.norm(x @ changed.T))

    calibrated = quantize_calibrated(weight, x.T @ x, quantization)
    assert error(calibrated) < 0.85 * error(quantize(weight, quantization))
