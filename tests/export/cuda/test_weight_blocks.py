"""Quantized weights as the kernel reads them: every number at its place, and which are refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sedac_export import SedacError
from sedac_export.arrays import Array
from sedac_export.bundle import Bundle
from sedac_export.bundle.target_check import FAILED
from sedac_export.cuda.add_cuda import add_cuda
from sedac_export.cuda.validate_chain import validate
from sedac_export.cuda.weight_blocks import QuantizedBlocks
from sedac_export.graph.quantized_graph import SCALES, ZERO_POINTS
from sedac_export.model.quantization import Quantization, QuantizedRows, quantize

from .conftest import HalfBundle
from .test_validate_chain import change_weights

FORMATS = [
    Quantization(bits, size, symmetric)
    for bits in (4, 8)
    for size in (32, 64)
    for symmetric in (True, False)
]


def parts_of(stored: QuantizedRows) -> dict[str, Array]:
    parts = {"": stored.values, SCALES: stored.scales}
    return parts if stored.zero_points is None else parts | {ZERO_POINTS: stored.zero_points}


def element(packed: Array, blocks: QuantizedBlocks, row: int, column: int) -> float:
    """A weight, by the layout's definition in blocks.cuh."""
    block = packed[row // 16, column // 32].tobytes()
    lower, lane, k = row % 16 // 8, row % 8 * 4 + column % 32 // 8, column % 8
    of_lane = 2 * blocks.bits
    numbers = block[lane * of_lane + lower * blocks.bits :]
    if blocks.bits == 8:
        number = numbers[k]
    else:
        place = k // 2 + k % 2 * 4
        number = numbers[place // 2] >> place % 2 * 4 & 15
    rest = 32 * of_lane
    scale = np.frombuffer(block, np.float16, 16, rest)[row % 8 * 2 + lower]
    zero = block[rest + 32 + row % 8 * 2 + lower] if blocks.zero_points else 1 << blocks.bits - 1
    return float((number - zero) * np.float32(scale))


@pytest.mark.parametrize("quantization", FORMATS, ids=str)
def test_every_number_is_at_its_place(quantization: Quantization) -> None:
    weight = np.random.default_rng(0).standard_normal((24, 128)).astype(np.float32)
    stored, blocks = quantize(weight, quantization), QuantizedBlocks(quantization)
    packed = blocks.pack(parts_of(stored))
    assert packed.dtype == np.uint8
    assert list(packed.shape) == blocks.shape(24, 128) == [2, 4, blocks.block_bytes]
    assert blocks.block_bytes % 16 == 0  # what copies to shared memory take
    exact = stored.dequantized(quantization, 128)
    elements = [[element(packed, blocks, r, c) for c in range(128)] for r in range(24)]
    np.testing.assert_allclose(elements, exact, rtol=2**-10)
    np.testing.assert_array_equal(elements, blocks.weights(parts_of(stored)))
    np.testing.assert_array_equal(elements, blocks.unpack(packed, 24))


@given(st.integers(1, 40), st.integers(1, 3), st.sampled_from(FORMATS), st.integers(0, 2**32 - 1))
def test_what_is_packed_comes_out_again(
    rows: int, count: int, quantization: Quantization, seed: int
) -> None:
    rng, columns = np.random.default_rng(seed), count * quantization.block_size
    stored = QuantizedRows(
        rng.integers(0, 256, (rows, count, quantization.bytes_of(quantization.block_size)), "u1"),
        rng.standard_normal((rows, count)).astype(np.float32),
        None
        if quantization.symmetric
        else rng.integers(0, 256, (rows, quantization.bytes_of(count)), "u1"),
    )
    blocks, parts = QuantizedBlocks(quantization), parts_of(stored)
    unpacked = blocks.unpack(blocks.pack(parts), rows)
    assert unpacked.shape == (rows, columns)
    np.testing.assert_array_equal(unpacked, blocks.weights(parts))


def test_scales_beyond_fp16_are_refused() -> None:
    quantization = Quantization(4)
    stored = quantize(np.ones((16, 32), np.float32), quantization)
    with pytest.raises(SedacError, match=r"scales beyond the range of fp16.*leave the target out"):
        QuantizedBlocks(quantization).pack(parts_of(replace(stored, scales=stored.scales * 1e9)))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("name", "precision", "settings"),
    [
        ("qwen2", "int4", {}),
        ("phi3", "int4", {"symmetric": False}),
        ("mistral", "int8", {}),
    ],
)
def test_a_quantized_bundle_has_the_chain(
    name: str, precision: Any, settings: dict[str, Any], half_bundle: HalfBundle
) -> None:
    model, directory = half_bundle(name, precision, **settings)
    chain = add_cuda(directory, str(model))
    assert chain.block_bytes == {"qwen2": 288, "phi3": 304, "mistral": 544}[name]
    assert add_cuda(directory).fingerprint == chain.fingerprint
    validation = validate(directory)
    structure, agreement, _ = validation.checks
    assert structure.problems == agreement.problems == []
    assert validation.exit_code() == 0


@pytest.mark.usefixtures("stand_in")
def test_another_number_is_caught(half_bundle: HalfBundle) -> None:
    model, directory = half_bundle("qwen2", "int4")
    add_cuda(directory, str(model))

    def change(weights: dict[str, Array]) -> None:
        weights["layers.2.down"][1, 1, 17] ^= 1
        weights["head"][0, 0, 0] ^= 1

    change_weights(directory, change)
    validation = validate(directory)
    assert validation.exit_code() == FAILED["structure"]
    assert validation.checks[0].problems == [
        "weights: head is not the bundle's",
        "weights: layers.2 has 1 rows that are not the bundle's",
    ]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"keep_precision": "1"}, "takes weights that are all quantized alike"),
        ({"block_size": 16}, r"blocks of 32, .* and these are of 16; build with --block-size 32"),
        ({"block_size": 64}, "these are of 64; build with --block-size 32"),
    ],
)
def test_what_the_kernel_does_not_read_is_refused(
    settings: dict[str, Any], reason: str, half_bundle: HalfBundle
) -> None:
    model, directory = half_bundle("qwen2", "int4", **settings)
    with pytest.raises(SedacError, match=reason):
        add_cuda(directory, str(model))
    assert Bundle.open(directory).manifest.cuda is None
