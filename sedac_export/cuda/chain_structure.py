"""Whether a bundle's files for the target cuda are what its manifest and its engines say."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from ctypes import sizeof

import numpy as np
import torch
from safetensors import safe_open

from sedac_export.arrays import Array
from sedac_export.bundle import Bundle
from sedac_export.bundle.cuda_entry import ChainModule, CudaChain
from sedac_export.cuda.chain_abi import BatchKernel, Facts
from sedac_export.cuda.compiler import ROWS
from sedac_export.cuda.cubin import Cubin
from sedac_export.cuda.layer_weights import MATRICES
from sedac_export.cuda.packing import context_tables, matrix_shapes
from sedac_export.cuda.stored_weights import StoredWeights
from sedac_export.cuda.weight_blocks import Parts, weight_blocks

_BATCH = {kernel.entry for kernel in BatchKernel}
_ENTRIES = [*(f"chain_{rows}" for rows in ROWS), "prepare", "draft", *sorted(_BATCH)]

# reads a tensor of the file
_Read = Callable[[str], Array]


def module_problems(bundle: Bundle, module: ChainModule, block_bytes: int) -> list[str]:
    """What a compiled file is otherwise than the manifest says, a sentence each.

    block_bytes: of the weights that it is to read.
    """
    code = bundle.read(module.file)
    if module.architecture.startswith("compute_"):
        return list(_ptx_problems(code, module))
    try:
        return list(_cubin_problems(Cubin(code), module, block_bytes))
    except ValueError as error:
        return [str(error)]


def weight_problems(bundle: Bundle, chain: CudaChain) -> list[str]:
    """Which packed weights are not the bundle's own, a sentence each."""
    stored = StoredWeights(bundle)
    with safe_open(bundle.path(chain.weights), "np") as file:
        names = set(file.keys())
        problems = list(_end_problems(stored, chain, names, file.get_tensor))
        problems += _table_problems(bundle, chain, file.get_tensor)
        for index in range(chain.shape.layers):
            prefix = f"layers.{index}."
            own = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
            problems += _layer_problems(stored, chain, index, own, file.get_tensor)
    return problems


def _ptx_problems(code: bytes, module: ChainModule) -> Iterator[str]:
    text = code.decode(errors="replace")
    target = module.architecture.replace("compute_", "sm_")
    if f".target {target}" not in text:
        yield f"it is not for {target}"
    yield from (f"it has no entry {e}" for e in _ENTRIES if f".entry {e}(" not in text)


def _cubin_problems(cubin: Cubin, module: ChainModule, block_bytes: int) -> Iterator[str]:
    if cubin.architecture != module.architecture:
        yield f"it is for {cubin.architecture} instead of {module.architecture}"
    registers = cubin.registers()
    yield from (f"it has no entry {entry}" for entry in _ENTRIES if entry not in registers)
    held = cubin.facts()
    facts = Facts.from_buffer_copy(held.ljust(sizeof(Facts), b"\0"))
    if len(held) != sizeof(Facts) or not facts.fit():
        yield "it was compiled from the sources of another version; run sedac-export engines again"
    elif facts.weight_block_bytes != block_bytes:
        yield f"it reads blocks of {facts.weight_block_bytes} bytes instead of {block_bytes}"
    for kernel, shared in zip(module.kernels, facts.shared_bytes, strict=True):
        entry = f"chain_{kernel.rows}"
        found = registers.get(entry, 0), shared
        if found != (kernel.registers, kernel.shared_bytes):
            yield (
                f"{entry} takes {found[0]} registers and {found[1]} bytes of shared memory instead"
                f" of {kernel.registers} and {kernel.shared_bytes}"
            )


def _end_problems(
    stored: StoredWeights, chain: CudaChain, names: set[str], read: _Read
) -> Iterator[str]:
    """Of what lies before and after the layers."""
    rows = chain.shape.vocabulary
    blocks = weight_blocks(stored.bundle.manifest, chain.shape)

    def is_own(name: str, parts: Parts) -> bool:
        return np.array_equal(blocks.unpack(read(name), rows), blocks.weights(parts))

    if not is_own("head", stored.projection()):
        yield "head is not the bundle's"
    if ("embed" in names) == stored.tied():
        yield "embed is there though it is the head's, or missing though it is not"
    elif "embed" in names and not is_own("embed", stored.embedding()):
        yield "embed is not the bundle's"
    if not _is_norm(read("final_norm"), [stored.final_norm()]):
        yield "final_norm is not the bundle's"


def _table_problems(bundle: Bundle, chain: CudaChain, read: _Read) -> Iterator[str]:
    """Of the rotary tables, which rotate nothing or are contexts."""
    length = bundle.manifest.max_cache_length
    known = [table.numpy() for table in context_tables(bundle, length)]
    for index in sorted({layer.rotary for layer in chain.layers}):
        for name, still in (("cos", 1), ("sin", 0)):
            table = read(f"rotary.{index}.{name}")
            same = any(np.array_equal(table, other) for other in known)
            if not same and not (table == still).all():
                yield f"rotary.{index}.{name} is none of the bundle's tables"


def _layer_problems(
    stored: StoredWeights, chain: CudaChain, index: int, own: set[str], read: _Read
) -> Iterator[str]:
    """The rows of all packed matrices, and the numbers of all biases, are those of the layer.

    Which module does what is not known here: recomputing the layer shows whether they are in place.
    """
    blocks = weight_blocks(stored.bundle.manifest, chain.shape)
    prefix, shapes = f"layers.{index}.", matrix_shapes(chain.shape)
    packed = [blocks.unpack(read(prefix + name), shapes[name][0]) for name in MATRICES]
    own_matrices = (blocks.weights(parts) for parts in stored.matrices(index))
    strangers = _rows(packed) - _rows(own_matrices)
    if strangers:
        yield f"{prefix.rstrip('.')} has {strangers.total()} rows that are not the bundle's"
    vectors = stored.vectors(index)
    for name in sorted(own - set(MATRICES)):
        vector = read(prefix + name)
        if name.endswith("_bias"):
            same = set(vector) <= {0.0, *np.concatenate(vectors, dtype=np.float32)}
        else:
            same = _is_norm(vector, vectors)
        if not same:
            yield f"{prefix}{name} is not the bundle's"


def _rows(matrices: Iterable[Array]) -> Counter[int]:
    """How often each row occurs, by its hash."""
    return Counter(hash(row.tobytes()) for matrix in matrices for row in matrix)


def _is_norm(vector: Array, stored: list[Array]) -> bool:
    """Whether it is one of those `stored`, to which some models add 1."""
    wide = (torch.from_numpy(w).float() for w in stored if w.shape == vector.shape)
    return any(np.array_equal(vector, w.numpy() + offset) for w in wide for offset in (0, 1))
