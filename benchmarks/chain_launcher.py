"""Launches passes of the chain's kernel over a decoder's weights; PyTorch holds the memory."""

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from chain_decoder import ChainCase, History, RandomDecoder
from torch import Tensor

from sedac_export.cuda.chain_abi import (
    BATCH_LOGITS_ROWS,
    MAX_ROWS,
    BatchOutcome,
    BatchPass,
    BatchRow,
    Condition,
    DraftPass,
    Layer,
    Outcome,
    Pass,
    Row,
    RowRace,
    RowRule,
    SequenceRows,
    divides_anew,
)
from sedac_export.cuda.compiler import ARCHITECTURES, NEWEST, CompiledChain, Compiler
from sedac_export.cuda.loaded_chain import LoadedChain, UnsupportedGpuError
from sedac_export.cuda.weight_blocks import HALF

# passes whose outcomes are kept until the host reads them
OUTCOMES = 64
# what passes and batches take
_SHARED_WITH_BATCHES = (
    *("layers", "embed", "head", "final_norm", "cos", "sin", "logits", "chosen"),
)


@dataclass(frozen=True)
class SequenceInput:
    """A sequence's part of a pass: rows of (token, position, first layer), and where it stops.

    fills: whether caches of layers that it skips are filled. conditions: [criteria, layers].
    """

    rows: list[tuple[int, int, int]]
    slot: int = 0
    max_depth: int | None = None
    conditions: Sequence[Condition] = ()
    fills: bool = False

    @classmethod
    def of_tokens(
        cls,
        tokens: Iterable[int],
        position: int,
        slot: int = 0,
        max_depth: int | None = None,
        conditions: Sequence[Condition] = (),
        *,
        fills: bool = False,
    ) -> "SequenceInput":
        """Tokens from `position` on, each through all layers that run."""
        rows = [(token, position + index, 0) for index, token in enumerate(tokens)]
        return cls(rows, slot, max_depth, conditions, fills)


def card_architecture() -> str:
    """What is compiled for the current device. Raises UnsupportedGpuError where nothing is."""
    major, minor = torch.cuda.get_device_capability()
    # machine code runs on later GPUs of the same major capability, and the list ascends
    for name in reversed(ARCHITECTURES):
        built_major, built_minor = divmod(int(name.removeprefix("sm_")), 10)
        if built_major == major and built_minor <= minor:
            return name
    if major > int(NEWEST.removeprefix("compute_")) // 10:
        return NEWEST
    raise UnsupportedGpuError(
        f"{torch.cuda.get_device_name()} is of compute capability {major}.{minor}, and the chain"
        f" is compiled for {', '.join(ARCHITECTURES)}"
    )


def compile_chain(compiler: Compiler, case: ChainCase, architecture: str) -> CompiledChain:
    """The chain for the case. Raises UnsupportedGpuError where it does not fit."""
    compiled = compiler.compile_for(architecture, case.macros())
    if compiled is None:
        raise UnsupportedGpuError(f"shared memory of {architecture} is too small")
    return compiled


class ChainLauncher:
    """A chain on the current device: its weights, caches [slot] and buffers."""

    def __init__(self, case: ChainCase, compiled: CompiledChain, slots: int = 4) -> None:
        self.decoder, self.capacity = RandomDecoder(case), case.capacity
        torch.zeros(1, device="cuda")  # makes the context current
        self.chain = LoadedChain(compiled.code)
        self._hold_weights(slots)
        self._allocate(slots)
        self._previous_rows, self._parity = MAX_ROWS, 0
        self._prepare()

    def fill(self, slot: int, positions: int, seed: int = 1) -> History:
        """Make a random history the slot's cache."""
        history = self.decoder.history(positions, seed)
        for caches, numbers in ((self.keys, history.keys), (self.values, history.values)):
            for cache, filled in zip(caches, numbers, strict=True):
                cache[slot].zero_()
                cache[slot, :, :positions] = filled
        return history

    def hold_exit(self, depth: int, kind: str, weights: Iterable[Tensor]) -> None:
        """Give the chain the probe, lens or exit_head after `depth` layers: its tensors in turn."""
        numbers = torch.cat([tensor.flatten() for tensor in weights])
        self._exits.append(numbers)
        setattr(self._layers[depth - 1], kind, numbers.data_ptr())
        self._has_lenses |= kind == "lens"
        self._buffers["layers"] = _on_device(self._layers)

    def hold_exit_head(self, depth: int) -> None:
        """Give it the decoder's learned probe there, as an exit head reads it."""
        probe = self.decoder.learned_probe(depth)
        tensors = probe.state.weight, probe.scalars.weight, probe.scalars.bias
        self.hold_exit(
            depth, "exit_head", (*tensors, probe.up.weight, probe.linear.weight, probe.linear.bias)
        )

    def forget_exits(self) -> None:
        """Take all of these away."""
        for layer in self._layers:
            layer.probe = layer.lens = layer.exit_head = 0
        self._has_lenses = False
        self._buffers["layers"] = _on_device(self._layers)

    def hold_frequent_tokens(self, tokens: Tensor) -> None:
        """Give exit heads the head's rows of `tokens`, int64."""
        rows = torch.zeros(len(tokens), self.decoder.shape.hidden, dtype=torch.half, device="cuda")
        chosen = tokens.to("cuda", torch.int32)
        torch.cuda.synchronize()
        addresses = self._buffers["head"].data_ptr(), chosen.data_ptr(), rows.data_ptr()
        self.chain.gather_rows(*addresses, len(tokens), self._stream.cuda_stream)
        torch.cuda.synchronize()
        self._buffers["frequent_rows"] = rows

    def take_features(self, depths: list[int]) -> Tensor:
        """Let passes leave the hidden states after `depths`, [slot, capacity, depths, hidden]."""
        self.feature_depths = depths
        sizes = len(self._buffers["saved"]), self.capacity, len(depths), self.decoder.shape.hidden
        states = torch.zeros(sizes, dtype=torch.bfloat16, device="cuda")
        self._buffers["feature_states"] = states
        return states

    def draft(self, wanted: DraftPass) -> None:
        """Run a launch of a trained drafter to its end."""
        wanted.blocks, wanted.capacity = self.chain.blocks // wanted.sequences, self.capacity
        wanted.embed = self._buffers["embed"].data_ptr()
        torch.cuda.synchronize()
        self.chain.draft(wanted, self._stream.cuda_stream)
        torch.cuda.synchronize()

    def make_prefill(self, tokens: Sequence[int], position: int, slot: int = 0) -> BatchPass:
        """The parameter of a prefill of up to BATCH_ROWS tokens from `position` on."""
        rows = [BatchRow(token, position + index, slot) for index, token in enumerate(tokens)]
        return self.make_batch(rows, [])

    def make_batch(
        self,
        rows: Sequence[BatchRow],
        logits_rows: Sequence[int],
        races: Mapping[int, RowRace] = MappingProxyType({}),
        rules: Mapping[int, RowRule] = MappingProxyType({}),
    ) -> BatchPass:
        """The parameter of a batch.

        logits_rows: the rows that want logits; races and rules: of those of them whose tokens are
        sampled, and about which a rule decides, by their index in logits_rows.
        """
        made = BatchPass(capacity=self.capacity, blocks=self.chain.blocks)
        made.rows, made.logits_rows = len(rows), len(logits_rows)
        for index, row in enumerate(rows):
            made.row[index] = row
        made.logits_row[: made.logits_rows] = logits_rows
        made.features = len(self.feature_depths)
        made.feature_depths[: made.features] = self.feature_depths
        for name in _SHARED_WITH_BATCHES:
            setattr(made, name, self._buffers[name].data_ptr())
        if self.feature_depths:
            made.feature_states = self._buffers["feature_states"].data_ptr()
        made.scratch, made.outcome = self._batch_scratch.data_ptr(), self._batch_outcome.data_ptr()
        self._races, made.sampled = _by_row(RowRace, races)
        self._rules, made.deciding = _by_row(RowRule, rules)
        made.races, made.rules = self._races.data_ptr(), self._rules.data_ptr()
        return made

    def rule(self, conditions: Sequence[Condition], *, freezes: bool = False) -> RowRule:
        """A rule of a batch, whose conditions [criteria, layers] are held as long as this."""
        criteria = len(conditions) // self.decoder.shape.layers
        return RowRule(self._hold(conditions), criteria, freezes)

    def launch_batch(self, wanted: BatchPass) -> None:
        """Enqueue a batch."""
        self.chain.run_batch(wanted, self.decoder.shape.layers, self._stream.cuda_stream)

    def run_batch(self, wanted: BatchPass) -> Tensor:
        """Run a batch to its end; its logits [logits rows, vocabulary]."""
        torch.cuda.synchronize()
        self.launch_batch(wanted)
        torch.cuda.synchronize()
        return self._buffers["logits"][: wanted.logits_rows].clone()

    def batch_outcome(self) -> BatchOutcome:
        """What a batch left, once it has ended."""
        return BatchOutcome.from_address(self._batch_outcome.data_ptr())

    def captured(self, wanted: BatchPass) -> torch.cuda.CUDAGraph:
        """A batch as a graph: Python launches kernels more slowly than they run."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self.launch_batch(wanted)
        return graph

    def make_pass(
        self,
        sequences: Sequence[SequenceInput],
        logits_rows: int | None = None,
        races: Sequence[RowRace] = (),
        steps: int = 1,
    ) -> Pass:
        """The parameter of a pass.

        logits_rows: bits of the rows that want logits, default all; races: of the first rows, whose
        tokens are sampled, or of all rows of each step; steps: at most as many, whatever is chosen.
        """
        blocks = self.chain.blocks
        made = Pass(capacity=self.capacity, blocks=blocks, sequences=len(sequences))
        made.has_lenses = self._has_lenses
        made.features = len(self.feature_depths)
        made.feature_depths[: made.features] = self.feature_depths
        made.frequent_tokens = len(self._buffers["frequent_rows"])
        for name, tensor in self._buffers.items():
            setattr(made, name, tensor.data_ptr())
        first = 0
        for index, sequence in enumerate(sequences):
            made.sequence[index] = self._sequence_rows(sequence, first)
            if any(divides_anew(position) for _, position, _ in sequence.rows[1:]):
                raise ValueError("attention divides keys anew within a sequence's rows")
            for row, (token, position, first_layer) in enumerate(sequence.rows, first):
                made.row[row] = Row(token, position, index, first_layer)
            first += len(sequence.rows)
        made.rows = first
        made.logits_rows = (1 << first) - 1 if logits_rows is None else logits_rows
        made.sampled_rows = (1 << min(len(races), first)) - 1
        made.steps = steps
        for row, race in enumerate(races):
            made.race[row] = race
        return made

    def launch(self, wanted: Pass, outcome: int = 0) -> None:
        """Enqueue a pass, which leaves its outcome at the index `outcome`."""
        scratch, following = self._scratch[self._parity], self._scratch[1 - self._parity]
        wanted.scratch, wanted.next_scratch = scratch.data_ptr(), following.data_ptr()
        wanted.clear_rows, self._previous_rows = self._previous_rows, wanted.rows
        wanted.outcome = self._outcomes.data_ptr() + outcome * ctypes.sizeof(Outcome)
        self._parity = 1 - self._parity
        self.chain.launch(wanted, self._stream.cuda_stream)

    def run(
        self,
        sequences: Sequence[SequenceInput],
        logits_rows: int | None = None,
        races: Sequence[RowRace] = (),
    ) -> Tensor:
        """Run one pass to its end; logits [rows, vocabulary], NaN where none are wanted."""
        return self.run_pass(self.make_pass(sequences, logits_rows, races))

    def run_pass(self, wanted: Pass) -> Tensor:
        """The same of a pass that is made; the rows of each step in turn."""
        self._buffers["logits"].fill_(float("nan"))
        torch.cuda.synchronize()
        self.launch(wanted)
        torch.cuda.synchronize()
        return self._buffers["logits"][: wanted.rows * self.outcome().steps].clone()

    def outcome(self, index: int = 0) -> Outcome:
        """What a pass left, once it has ended."""
        return Outcome.from_address(self._outcomes.data_ptr() + index * ctypes.sizeof(Outcome))

    @property
    def chosen(self) -> Tensor:
        """Tokens of the last pass, int32, by step and row, or batch, by logits row; -1 for NaN."""
        return self._buffers["chosen"]

    @property
    def saved(self) -> Tensor:
        """Hidden states at exits, [slot, capacity, hidden]."""
        return self._buffers["saved"][..., : self.decoder.shape.hidden]

    def _hold_weights(self, slots: int) -> None:
        decoder, shape = self.decoder, self.decoder.shape
        sizes = slots, shape.key_value_heads, self.capacity, shape.head_size
        self.keys, self.values = (
            [torch.zeros(sizes, dtype=torch.half, device="cuda") for _ in range(shape.layers)]
            for _ in range(2)
        )
        self._weights = [self._packed_layer(i) for i in range(shape.layers)]
        layers = self._layers = (Layer * shape.layers)()
        self._exits: list[Tensor] = []
        self._has_lenses = False
        self.feature_depths: list[int] = []
        for layer, weights, keys, values in zip(
            layers, self._weights, self.keys, self.values, strict=True
        ):
            for name, tensor in (weights | {"keys": keys, "values": values}).items():
                setattr(layer, name, tensor.data_ptr())
            layer.window = decoder.case.window
        packed = decoder.case.format.pack(decoder.embedding())
        cos, sin = decoder.rotary_tables(self.capacity)
        self._buffers = {
            "layers": _on_device(layers),
            "embed": packed,
            "head": packed,
            "final_norm": decoder.final_norm,
            "frequent_rows": torch.zeros(0, shape.hidden, dtype=torch.half, device="cuda"),
            "cos": cos,
            "sin": sin,
        }

    def _packed_layer(self, index: int) -> dict[str, Tensor]:
        weights = self.decoder.layer(index)
        # halves of tiles alternate
        gate, up = (weights.pop(name) for name in ("gate", "up"))
        halves = [matrix.view(-1, HALF, matrix.shape[1]) for matrix in (gate, up)]
        weights["gate_up"] = torch.stack(halves, 1).flatten(0, 2)
        pack = self.decoder.case.format.pack
        return {name: pack(w) if w.dim() == 2 else w for name, w in weights.items()}

    def _allocate(self, slots: int) -> None:
        shape, facts = self.decoder.shape, self.chain.facts
        self._buffers |= {
            "logits": torch.zeros(BATCH_LOGITS_ROWS, shape.vocabulary, device="cuda"),
            "saved": torch.zeros(slots, self.capacity, facts.saved_floats, device="cuda"),
            "tables": _zeros(facts.table_bytes * self.chain.blocks),
            "chosen": torch.zeros(BATCH_LOGITS_ROWS, dtype=torch.int32, device="cuda"),
        }
        self._scratch = [_zeros(facts.scratch_bytes) for _ in range(2)]
        self._batch_scratch = _zeros(facts.batch_scratch_bytes)
        # the device writes pinned memory at the address that it has on the host
        size = OUTCOMES * ctypes.sizeof(Outcome)
        self._outcomes = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        size = ctypes.sizeof(BatchOutcome)
        self._batch_outcome = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        self._conditions: list[Tensor] = []
        self._stream = torch.cuda.Stream()

    def _prepare(self) -> None:
        torch.cuda.synchronize()
        self.chain.prepare(self._buffers["tables"].data_ptr(), self._stream.cuda_stream)
        torch.cuda.synchronize()

    def _sequence_rows(self, sequence: SequenceInput, first: int) -> SequenceRows:
        rows = SequenceRows(
            slot=sequence.slot,
            first_row=first,
            rows=len(sequence.rows),
            fills=sequence.fills,
            max_depth=sequence.max_depth or self.decoder.shape.layers,
        )
        if sequence.conditions:
            rows.criteria = len(sequence.conditions) // self.decoder.shape.layers
            rows.conditions = self._hold(sequence.conditions)
        return rows

    def _hold(self, conditions: Sequence[Condition]) -> int:
        """Their address, which is kept while this lives: passes may be launched at any time."""
        self._conditions.append(_on_device((Condition * len(conditions))(*conditions)))
        return self._conditions[-1].data_ptr()


def _by_row(kind: type[Any], of_rows: Mapping[int, Any]) -> tuple[Tensor, int]:
    """By logits row, and which of these have one, a bit each."""
    held = (kind * BATCH_LOGITS_ROWS)()
    for row, each in of_rows.items():
        held[row] = each
    return _on_device(held), sum(1 << row for row in of_rows)


def _on_device(structures: "ctypes.Array[Any]") -> Tensor:
    return torch.frombuffer(bytearray(structures), dtype=torch.uint8).cuda()


def _zeros(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8, device="cuda")
