"""Whether this host's quantized products give a row the same bits whatever is beside it."""

from functools import cache

import numpy as np
import pytest
from conftest import THREADS
from onnx import TensorProto, helper, numpy_helper

from sedac_export.bundle.sessions import Engine, shipped_graph

ROWS, COLUMNS, OUTPUTS, BLOCK = 4, 256, 512, 32


def skip_where_rows_differ(precision: str) -> None:
    """Skip a test of equal tokens where full depth and verification round differently."""
    if precision in ("int4", "int8") and not rows_have_the_same_bits(int(precision[3:])):
        pytest.skip(f"{precision} products of one row and of several have other bits on this CPU")


@cache
def rows_have_the_same_bits(bits: int) -> bool:
    """Of products as the runtime computes bundles': symmetric blocks, activations in 8 bits."""
    product = _product(bits)
    x = np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    together = product.run({"x": x})["y"]
    alone = [product.run({"x": row[None]})["y"] for row in x]
    return np.array_equal(together, np.concatenate(alone))


def _product(bits: int) -> Engine:
    generator, blocks = np.random.default_rng(0), COLUMNS // BLOCK
    numbers = generator.integers(0, 256, (OUTPUTS, blocks, BLOCK * bits // 8), dtype=np.uint8)
    scales = generator.random(OUTPUTS * blocks, dtype=np.float32)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "numbers", "scales"],
        ["y"],
        domain="com.microsoft",
        K=COLUMNS,
        N=OUTPUTS,
        bits=bits,
        block_size=BLOCK,
        accuracy_level=4,
    )
    sizes = {"x": COLUMNS, "y": OUTPUTS}
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
        for name, size in sizes.items()
    )
    weights = [
        numpy_helper.from_array(numbers, "numbers"),
        numpy_helper.from_array(scales, "scales"),
    ]
    graph = helper.make_graph([node], "product", [x], [y], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return Engine(shipped_graph(model.SerializeToString()), THREADS)
