"""The runtime's own operators beside ONNX Runtime's, through the library that both load."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import THREADS
from onnx import TensorProto, helper, numpy_helper

from sedac_export.bundle.sessions import Engine, shipped_graph
from sedac_runtime import _core

WIDTH, COLUMNS = 80, 50
KINDS = ("int4", "int8", "fp16", "bf16")


def product(kind: str, bias: bool = False) -> onnx.ModelProto:
    """y = x W, whose weights are stored in `kind`, and a bias where MatMulNBits or Gemm adds it."""
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((COLUMNS, WIDTH)).astype(np.float32)
    tensors = [numpy_helper.from_array(np.arange(COLUMNS, dtype=np.float32), "bias")]
    if kind in ("fp16", "bf16"):
        element = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[kind]
        tensors.append(helper.make_tensor("w", element, weights.shape, weights.flatten()))
        nodes = [
            helper.make_node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT),
            helper.make_node("Gemm", ["x", "w32", *(["bias"] * bias)], ["y"], transB=1),
        ]
    else:
        bits, blocks = int(kind[3:]), -(-WIDTH // 32)
        shape = (COLUMNS, blocks, 4 * bits)
        numbers = generator.integers(0, 256, shape, dtype=np.uint8)
        scales = generator.random((COLUMNS, blocks), dtype=np.float32)
        tensors += [numpy_helper.from_array(numbers, "w"), numpy_helper.from_array(scales, "s")]
        inputs = ["x", "w", "s", *(["", "", "bias"] * bias)]
        settings: dict[str, Any] = {"bits": bits, "block_size": 32, "accuracy_level": 4}
        sizes = {"K": WIDTH, "N": COLUMNS}
        node = helper.make_node(
            "MatMulNBits", inputs, ["y"], domain="com.microsoft", **settings, **sizes
        )
        nodes = [node]
    return model(nodes, tensors)


def model(nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto]) -> onnx.ModelProto:
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
        for name, size in {"x": WIDTH, "y": COLUMNS}.items()
    )
    graph = helper.make_graph(nodes, "product", [x], [y], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def _has_operators() -> None:
    if _core.with_own_operators(product("int4").SerializeToString()) is None:
        pytest.skip("the runtime has no products of its own on this CPU")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_onnxruntime(kind: str, bias: bool) -> None:
    graph = product(kind, bias).SerializeToString()
    theirs, ours = Engine(graph, THREADS), Engine(shipped_graph(graph), THREADS)
    for count in (0, 1, 5, 16, 130):
        x = rows(count)
        expected, given = (engine.run({"x": x})["y"] for engine in (theirs, ours))
        assert given.shape == expected.shape
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_company(kind: str) -> None:
    engine = Engine(shipped_graph(product(kind).SerializeToString()), THREADS)
    x = rows(130)
    together = engine.run({"x": x})["y"]
    for first, count in ((0, 1), (3, 1), (4, 7), (8, 16), (64, 66)):
        part = engine.run({"x": x[first : first + count]})["y"]
        np.testing.assert_array_equal(part, together[first : first + count])


def test_a_product_is_not_written_over_its_rows() -> None:
    """As a graph's caches could be, which are read and written in the same memory."""
    weights = np.eye(WIDTH, dtype=np.float32)
    tensor = helper.make_tensor("w", TensorProto.FLOAT16, weights.shape, weights.flatten())
    nodes = [
        helper.make_node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w32"], ["y"]),
    ]
    square = model(nodes, [tensor])
    square.graph.output[0].type.tensor_type.shape.dim[1].dim_value = WIDTH
    graph = shipped_graph(square.SerializeToString())
    session = Engine(graph, THREADS).session
    memory = onnxruntime.OrtValue.ortvalue_from_numpy(rows(3))
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", memory)
    binding.bind_ortvalue_output("y", memory)
    with pytest.raises(Exception, match="HalfMatMul: the output in the memory of an input"):
        session.run_with_iobinding(binding)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_noticed_in_its_row(kind: str, bad: float) -> None:
    engine = Engine(shipped_graph(product(kind).SerializeToString()), THREADS)
    x = rows(20)
    x[7, 3] = bad
    finite = np.isfinite(engine.run({"x": x})["y"])
    assert not finite[7].any()
    assert np.delete(finite, 7, axis=0).all()
