"""Lay a bundle's weights out as the kernel reads them, in one safetensors file, layer by layer."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sedac_export.arrays import Array
from sedac_export.bundle import Bundle
from sedac_export.bundle.cuda_entry import ChainShape
from sedac_export.bundle.sessions import load_engine
from sedac_export.console import StageProgress
from sedac_export.cuda.description import ChainDescription, still
from sedac_export.cuda.layer_weights import MATRICES
from sedac_export.cuda.observation import FIRST_POSITION, TOKENS, Tables
from sedac_export.cuda.stored_weights import StoredWeights
from sedac_export.cuda.weight_blocks import Parts, WeightBlocks, weight_blocks
from sedac_export.errors import SedacError

# rows of a matrix that are laid out at once
_ROWS = 4096

# between tables computed in fp32 and in fp64
_TABLE_TOLERANCE = 1e-4

_DTYPES = {"F16": np.float16, "F32": np.float32, "U8": np.uint8}


@dataclass(frozen=True)
class PackedTensor:
    """A tensor of the file: its name, dtype (F16, F32 or U8), shape, and how its bytes are made."""

    name: str
    dtype: str
    shape: list[int]
    pieces: Callable[[], Iterator[Array]]

    @property
    def bytes(self) -> int:
        """What it takes in the file."""
        return int(np.prod(self.shape)) * np.dtype(_DTYPES[self.dtype]).itemsize


def write_weights(
    path: Path, bundle: Bundle, description: ChainDescription, progress: StageProgress
) -> None:
    """Write the weights of `bundle`, laid out for the kernel, to `path`.

    Memory holds one matrix at a time. Weights of bf16 become fp16: the same numbers down to 2^-17,
    and below that to the nearest multiple of 2^-24. Raises SedacError when the bundle is of another
    model than `description`, and where a weight is beyond fp16.
    """
    tensors = list(packed_tensors(bundle, description))
    with path.open("wb") as file:
        file.write(_header(tensors))
        for done, tensor in enumerate(tensors):
            progress("pack", done, len(tensors))
            start = file.tell()
            for piece in tensor.pieces():
                file.write(np.ascontiguousarray(piece, _DTYPES[tensor.dtype]).data)
            if file.tell() - start != tensor.bytes:
                raise SedacError(
                    f"{bundle.directory}: {tensor.name} has another size than the model's; name the"
                    " model that the bundle was built from"
                )


def packed_tensors(bundle: Bundle, description: ChainDescription) -> Iterator[PackedTensor]:
    """What the file holds, in order."""
    stored = StoredWeights(bundle)
    shape = description.shape
    sizes = [shape.vocabulary, shape.hidden]
    blocks = weight_blocks(bundle.manifest, shape)
    yield _matrix("head", sizes, blocks, stored.projection)
    if not stored.tied():
        yield _matrix("embed", sizes, blocks, stored.embedding)
    norm = stored.final_norm().astype(np.float32) + description.final_norm_offset
    yield _vector("final_norm", [shape.hidden], lambda: norm)
    for index, tables in enumerate(_rotary(bundle, description)):
        for name, table in zip(("cos", "sin"), tables, strict=True):
            yield _vector(f"rotary.{index}.{name}", list(table.shape), table.numpy)
    for index in range(shape.layers):
        yield from _layer(stored, description, blocks, index)


def _header(tensors: list[PackedTensor]) -> bytes:
    """https://huggingface.co/docs/safetensors: length of the JSON text, and the text."""
    entries, end = {}, 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _layer(
    stored: StoredWeights, description: ChainDescription, blocks: WeightBlocks, index: int
) -> Iterator[PackedTensor]:
    weights, read = description.weights[index], stored.reader(index)
    for name, sizes in matrix_shapes(description.shape).items():

        def matrix(name: str = name) -> Parts:
            return {
                suffix: weights.matrix(name, stored.reader(index, suffix)).numpy()
                for suffix in blocks.suffixes
            }

        yield _matrix(f"layers.{index}.{name}", sizes, blocks, matrix)
    for name in description.vectors():

        def vector(name: str = name) -> Array:
            result: Array = weights.vector(name, read).numpy()
            return result

        yield _vector(f"layers.{index}.{name}", [_vector_size(description.shape, name)], vector)


def matrix_shapes(shape: ChainShape) -> dict[str, list[int]]:
    """Rows and columns of a layer's matrices, by name."""
    attended = shape.heads * shape.head_size
    sizes = [
        [attended + 2 * shape.key_value_heads * shape.head_size, shape.hidden],
        [shape.hidden, attended],
        [2 * shape.intermediate, shape.hidden],
        [shape.hidden, shape.intermediate],
    ]
    return dict(zip(MATRICES, sizes, strict=True))


def _vector_size(shape: ChainShape, name: str) -> int:
    if name in ("query_norm", "key_norm"):
        return shape.head_size
    if name.endswith("_bias"):
        return matrix_shapes(shape)[name.removesuffix("_bias")][0]
    return shape.hidden


def _matrix(
    name: str, shape: list[int], blocks: WeightBlocks, matrix: Callable[[], Parts]
) -> PackedTensor:
    rows, columns = shape

    def pieces() -> Iterator[Array]:
        parts = matrix()
        for start in range(0, len(parts[""]), _ROWS):
            piece = {suffix: part[start : start + _ROWS] for suffix, part in parts.items()}
            try:
                yield blocks.pack(piece)
            except SedacError as error:
                raise SedacError(f"{name}: {error}") from error

    return PackedTensor(name, blocks.dtype, blocks.shape(rows, columns), pieces)


def _vector(name: str, shape: list[int], vector: Callable[[], Array]) -> PackedTensor:
    return PackedTensor(name, "F32", shape, lambda: iter([vector()]))


def _rotary(bundle: Bundle, description: ChainDescription) -> Iterator[Tables]:
    """Tables [positions, half the rotary size] of every position that the caches have room for."""
    length, half = bundle.manifest.max_cache_length, description.shape.rotary_size // 2
    whole = context_tables(bundle, max(length, FIRST_POSITION + TOKENS))
    observed = slice(FIRST_POSITION, FIRST_POSITION + TOKENS)
    for tables in description.tables:
        if tables is None:
            yield still(length, half)
            continue
        cos, sin = (
            next((w for w in whole if _is_close(w[observed], table)), None) for table in tables
        )
        if cos is None or sin is None:
            raise SedacError(
                f"{bundle.directory} has other rotary tables than the model; name the model that"
                " the bundle was built from"
            )
        yield cos[:length], sin[:length]


def context_tables(bundle: Bundle, positions: int) -> list[torch.Tensor]:
    """What the contexts engine gives for the first `positions`, [positions, numbers] each."""
    file = bundle.manifest.engines.contexts
    if file is None:
        return []
    outputs = load_engine(bundle, file).run({"position_ids": np.arange(positions)[None]})
    return [torch.from_numpy(array[0]) for array in outputs.values()]


def _is_close(table: torch.Tensor, observed: torch.Tensor) -> bool:
    return table.shape == observed.shape and bool(
        (table - observed).abs().max() <= _TABLE_TOLERANCE
    )
