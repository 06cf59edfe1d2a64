"""The chain that a bundle's packed weights describe, computed by PyTorch on the CPU."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from sedac_export.arrays import Array, Floats
from sedac_export.bundle import Bundle
from sedac_export.bundle.agreement_row import GATES
from sedac_export.bundle.cuda_entry import CudaChain
from sedac_export.bundle.manifest import Manifest
from sedac_export.cuda import recomputation
from sedac_export.cuda.chain_agreement import ChainOutput, compare
from sedac_export.cuda.packing import matrix_shapes
from sedac_export.cuda.weight_blocks import weight_blocks

# rows of the head that are computed at once
_ROWS = 16384


def agreement(bundle: Bundle, chain: CudaChain, weights: Path) -> list[dict[str, Any]]:
    """What the file `weights` gives beside the bundle's ONNX Runtime engines: a report of each."""
    # scales of quantized weights are rounded to fp16
    gates = GATES["fp32" if bundle.manifest.quantization is None else "fp16"]
    return compare(bundle, RecomputedChain(bundle.manifest, chain, weights), gates)


class RecomputedChain:
    """Computes in fp32 what the kernel is to compute, from the file `weights`."""

    def __init__(self, manifest: Manifest, chain: CudaChain, weights: Path) -> None:
        opened: Callable[..., Any] = safe_open
        self._file = opened(weights, "np")
        self._blocks = weight_blocks(manifest, chain.shape)
        self._names = set(self._file.keys())
        self._chain, self._shape = chain, chain.shape
        self._layer = functools.lru_cache(maxsize=1)(self._load_layer)

    def run(self, start: Array, first_layer: int, depth: int) -> ChainOutput:
        """As ChainRunner has it."""
        with torch.no_grad():
            hidden = self._embed(start) if start.ndim == 1 else torch.from_numpy(start)
            before = hidden
            for index in range(first_layer, depth):
                before, hidden = hidden, self._run_layer(index, hidden)
            cosine = torch.nn.functional.cosine_similarity(before, hidden, dim=-1)
            values = self._head(hidden) if depth == self._shape.layers else hidden.numpy()
        return ChainOutput(values, dict(enumerate(((cosine + 1) / 2).tolist())))

    def run_after_exits(self, tokens: Array, exits: int, depth: int) -> Floats:
        """As ChainRunner has it."""
        with torch.no_grad():
            hidden = self._embed(tokens)
            for index in range(self._shape.layers):
                after = self._run_layer(index, hidden)
                # what a layer makes keys and values of stays what it was at the exit
                kept = hidden[:exits] if index >= depth else after[:exits]
                hidden = torch.cat([kept, after[exits:]])
            return self._head(hidden[exits:])

    def _embed(self, tokens: Array) -> Tensor:
        name = "embed" if "embed" in self._names else "head"
        rows = torch.from_numpy(self._matrix(name, self._shape.vocabulary)[tokens])
        return rows.float() * self._chain.options.embedding_scale

    def _run_layer(self, index: int, hidden: Tensor) -> Tensor:
        layer = self._chain.layers[index]
        tables = [
            torch.from_numpy(self._file.get_tensor(f"rotary.{layer.rotary}.{name}")[: len(hidden)])
            for name in ("cos", "sin")
        ]
        options = self._chain.options
        return recomputation.layer(
            hidden, self._layer(index), self._shape, options, layer.window, (tables[0], tables[1])
        )

    def _load_layer(self, index: int) -> dict[str, Tensor]:
        prefix, rows = f"layers.{index}.", matrix_shapes(self._shape)
        weights = {}
        for name in (name for name in self._names if name.startswith(prefix)):
            short = name.removeprefix(prefix)
            array = self._file.get_tensor(name)
            if short in rows:
                array = self._blocks.unpack(array, rows[short][0])
            weights[short] = torch.from_numpy(array).float()
        return weights

    def _head(self, hidden: Tensor) -> Floats:
        """Logits, by parts of the vocabulary."""
        matrix = self._matrix("head", self._shape.vocabulary)
        norm, options = torch.from_numpy(self._file.get_tensor("final_norm")), self._chain.options
        parts = [
            recomputation.head(hidden, norm, torch.from_numpy(part).float(), options).numpy()
            for part in np.split(matrix, range(_ROWS, len(matrix), _ROWS))
        ]
        logits: Floats = np.concatenate(parts, -1)
        return logits

    def _matrix(self, name: str, rows: int) -> Array:
        return self._blocks.unpack(self._file.get_tensor(name), rows)
