"""A bundle's compiled chain on the first GPU, to compare it."""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import safe_open

from sedac_export.arrays import Array, Floats
from sedac_export.bundle import Bundle
from sedac_export.bundle.cuda_entry import ChainModule, CudaChain
from sedac_export.cuda.chain_abi import (
    BATCH_LOGITS_ROWS,
    BATCH_ROWS,
    MAX_ROWS,
    BatchOutcome,
    BatchPass,
    BatchRow,
    Condition,
    Layer,
    Outcome,
    Pass,
    Row,
    SequenceRows,
)
from sedac_export.cuda.chain_agreement import ChainOutput
from sedac_export.cuda.gpu_memory import GpuMemory
from sedac_export.cuda.loaded_chain import LoadedChain

# a rule that asks for the stability and never exits
_NEVER = {"signal": 1, "threshold": 2.0, "run_length": 1}

_FLOAT = np.dtype(np.float32).itemsize


class GpuChain:
    """One sequence's caches and hidden states, and the chain over them.

    The caches hold noise where nothing was written: what no token may see
    must not show.
    """

    def __init__(self, bundle: Bundle, chain: CudaChain, module: ChainModule, memory: GpuMemory):
        self._memory, self._shape = memory, chain.shape
        self._capacity = bundle.manifest.max_cache_length
        self._chain = LoadedChain(bundle.read(module.file))
        self._common = self._upload(bundle, chain)
        self._last_rows = MAX_ROWS
        self._outcome: Any = memory.shared(Outcome)
        self._batch_outcome: Any = memory.shared(BatchOutcome)
        self._conditions = self._upload_rule()
        self._allocate()
        memory.synchronize()
        self._chain.prepare(self._common["tables"])
        memory.synchronize()

    def run(self, start: Array, first_layer: int, depth: int, rows: int = MAX_ROWS) -> ChainOutput:
        """As ChainRunner has it, in passes of `rows` tokens."""
        from_tokens, whole = start.ndim == 1, depth == self._shape.layers
        if not from_tokens:
            # without the factors of norms beside it, which the kernel then computes
            saved = np.zeros((len(start), self._chain.facts.saved_floats), np.float32)
            saved[:, : self._shape.hidden] = start
            self._memory.write(self._common["saved"], saved)
        logits: list[Floats] = []
        stabilities: dict[int, float] = {}
        for position in range(0, len(start), rows):
            tokens = start[position : position + rows]
            chosen = tokens.tolist() if from_tokens else [-1] * len(tokens)
            outcome = self._run_pass(_Piece(chosen, position, first_layer, depth, whole))
            stabilities[position + len(tokens) - 1] = outcome.sequence[0].stability
            if whole:
                logits.append(self._read("logits", (len(tokens), self._shape.vocabulary)))
        if whole:
            return ChainOutput(np.concatenate(logits), stabilities)
        saved = self._read("saved", (len(start), self._chain.facts.saved_floats))
        return ChainOutput(saved[:, : self._shape.hidden], stabilities)

    def run_after_exits(self, tokens: Array, exits: int, depth: int) -> Floats:
        """As ChainRunner has it; passes are full where they can be."""
        for start in range(0, exits, MAX_ROWS):
            some = tokens[start : min(start + MAX_ROWS, exits)].tolist()
            self._run_pass(_Piece(some, start, 0, depth, with_logits=False, fills=True))
        return self._run_whole(tokens[exits:], exits)

    def run_prefilled(self, tokens: Array) -> Floats:
        """Logits of the last MAX_ROWS of more tokens, in a pass; those before are prefilled."""
        held = len(tokens) - MAX_ROWS
        for start in range(0, held, BATCH_ROWS):
            end = min(start + BATCH_ROWS, held)
            self._run_batch(tokens[start:end].tolist(), start, with_logits=False)
        return self._run_whole(tokens[held:], held)

    def _run_whole(self, tokens: Array, position: int) -> Floats:
        """Logits of `tokens`, which follow `position` others, in passes through all layers."""
        logits = []
        for start in range(0, len(tokens), MAX_ROWS):
            some = tokens[start : start + MAX_ROWS].tolist()
            self._run_pass(_Piece(some, position + start, 0, self._shape.layers, True))
            logits.append(self._read("logits", (len(some), self._shape.vocabulary)))
        return np.concatenate(logits)

    def run_batched(self, tokens: Array) -> Floats:
        """Logits of all tokens, in batches."""
        logits = []
        for start in range(0, len(tokens), BATCH_LOGITS_ROWS):
            some = tokens[start : start + BATCH_LOGITS_ROWS].tolist()
            self._run_batch(some, start, with_logits=True)
            logits.append(self._read("logits", (len(some), self._shape.vocabulary)))
        return np.concatenate(logits)

    def _run_batch(self, tokens: list[int], start: int, with_logits: bool) -> None:
        names = ("layers", "embed", "head", "final_norm", "cos", "sin", "logits", "chosen")
        shared = {name: self._common[name] for name in names}
        sizes = {"capacity": self._capacity, "blocks": self._chain.blocks, "rows": len(tokens)}
        parameters = BatchPass(**shared, **sizes, scratch=self._batch_scratch)
        parameters.outcome = ctypes.addressof(self._batch_outcome)
        parameters.logits_rows = len(tokens) if with_logits else 0
        for row, token in enumerate(tokens):
            parameters.row[row] = BatchRow(token, start + row, 0)
        for row in range(parameters.logits_rows):
            parameters.logits_row[row] = row
        self._chain.run_batch(parameters, self._shape.layers)
        self._memory.synchronize()

    def _run_pass(self, piece: "_Piece") -> Outcome:
        parameters = Pass(**self._common, capacity=self._capacity, blocks=self._chain.blocks)
        parameters.scratch, parameters.next_scratch = self._scratch
        parameters.clear_rows, self._last_rows = self._last_rows, len(piece.tokens)
        self._scratch.reverse()
        piece.place(parameters, self._conditions)
        parameters.outcome = ctypes.addressof(self._outcome)
        self._chain.launch(parameters)
        self._memory.synchronize()
        outcome: Outcome = self._outcome
        return outcome

    def _read(self, name: str, shape: tuple[int, ...]) -> Floats:
        values: Floats = np.empty(shape, np.float32)
        self._memory.read(self._common[name], values)
        return values

    def _upload(self, bundle: Bundle, chain: CudaChain) -> dict[str, int]:
        """Addresses of the weights and of the layers' own, and the caches."""
        upload, shape = self._memory.upload, chain.shape
        sizes = shape.key_value_heads, self._capacity, shape.head_size
        noise = np.random.default_rng(0).standard_normal(sizes).astype(np.float16)
        layers = (Layer * shape.layers)()
        tables = range(1 + max(layer.rotary for layer in chain.layers))
        with safe_open(bundle.path(chain.weights), "np") as file:
            names = set(file.keys())
            for index, layer in enumerate(layers):
                prefix = f"layers.{index}."
                for name in (name for name in names if name.startswith(prefix)):
                    setattr(layer, name.removeprefix(prefix), upload(file.get_tensor(name)))
                layer.keys, layer.values = upload(noise), upload(noise)
                layer.window, layer.rotary = chain.layers[index].window, chain.layers[index].rotary
            head = upload(file.get_tensor("head"))
            rotary = {
                name: upload(np.stack([file.get_tensor(f"rotary.{k}.{name}") for k in tables]))
                for name in ("cos", "sin")
            }
            return rotary | {
                "layers": upload(np.frombuffer(bytes(layers), np.uint8)),
                "head": head,
                "embed": upload(file.get_tensor("embed")) if "embed" in names else head,
                "final_norm": upload(file.get_tensor("final_norm")),
            }

    def _allocate(self) -> None:
        zeros, facts, shape = self._memory.zeros, self._chain.facts, self._shape
        self._common |= {
            "saved": zeros(self._capacity * facts.saved_floats * _FLOAT),
            "tables": zeros(facts.table_bytes * self._chain.blocks),
            "logits": zeros(BATCH_LOGITS_ROWS * shape.vocabulary * _FLOAT),
            "chosen": zeros(BATCH_LOGITS_ROWS * ctypes.sizeof(ctypes.c_int)),
        }
        self._scratch = [zeros(facts.scratch_bytes) for _ in range(2)]
        self._batch_scratch = zeros(facts.batch_scratch_bytes)

    def _upload_rule(self) -> int:
        shape = self._shape
        conditions = (Condition * shape.layers)(*(Condition(**_NEVER) for _ in range(shape.layers)))
        return self._memory.upload(np.frombuffer(bytes(conditions), np.uint8))


@dataclass(frozen=True)
class _Piece:
    """The rows of a pass: tokens at consecutive positions, -1 for those that have hidden states."""

    tokens: list[int]
    position: int
    first_layer: int
    depth: int
    with_logits: bool
    fills: bool = False

    def place(self, parameters: Pass, conditions: int) -> None:
        """Make them a pass's only sequence."""
        count = len(self.tokens)
        parameters.rows, parameters.sequences = count, 1
        parameters.logits_rows = (1 << count) - 1 if self.with_logits else 0
        for row, token in enumerate(self.tokens):
            parameters.row[row] = Row(token, self.position + row, 0, self.first_layer)
        parameters.sequence[0] = SequenceRows(
            rows=count,
            max_depth=self.depth,
            fills=self.fills,
            criteria=1,
            conditions=conditions,
        )
