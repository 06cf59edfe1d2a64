"""A random trained drafter for the chain's kernel, on the device and in PyTorch."""

import ctypes
from collections.abc import Sequence

import torch
from chain_launcher import ChainLauncher
from torch import Tensor
from torch.nn import functional

from sedac_export.cuda.chain_abi import (
    DRAFT_SEQUENCES,
    MARGIN_BINS,
    MAX_ROWS,
    DraftOutcome,
    DraftPass,
    DraftSequence,
    RowRace,
)

# tokens, and the probability that the drafter gives each
Drafted = tuple[list[int], list[float]]

_EPSILON = 1e-5
_ROTARY_BASE = 10000.0
_DRAFT_TOKENS = 16384


class RandomDrafter:
    """Random weights on the device, and what PyTorch makes of them in fp32.

    features: hidden states that it takes, bf16 [slot, capacity, depths, hidden].
    """

    def __init__(self, launcher: ChainLauncher) -> None:
        shape = self.shape = launcher.decoder.shape
        self._launcher = launcher
        depths = sorted({2, shape.layers // 2, shape.layers})
        self.features = launcher.take_features(depths)
        generator = torch.Generator("cuda").manual_seed(5)
        hidden, size = shape.hidden, shape.head_size
        queries, keys = shape.heads * size, shape.key_value_heads * size

        def matrix(rows: int, columns: int) -> Tensor:
            numbers = torch.randn(rows, columns, device="cuda", generator=generator)
            return (numbers * columns**-0.5).half()

        def norm(*sizes: int) -> Tensor:
            return (1 + 0.1 * torch.randn(*sizes, device="cuda", generator=generator)).half()

        everything = torch.randperm(shape.vocabulary, device="cuda", generator=generator)
        self.tokens = everything[: min(_DRAFT_TOKENS, 3 * shape.vocabulary // 4)].sort().values
        embedding = launcher.decoder.rounded(launcher.decoder.embedding())
        self._embedding = embedding * launcher.decoder.options.embedding_scale
        self.weights = {
            "combine": matrix(hidden, len(depths) * hidden),
            "join": matrix(hidden, 2 * hidden),
            "qkv": matrix(queries + 2 * keys, hidden),
            "o": matrix(hidden, queries),
            "gate_up": matrix(2 * shape.intermediate, hidden),
            "down": matrix(hidden, shape.intermediate),
            "head": embedding[self.tokens].half(),
            "feature_norms": norm(len(depths), hidden),
            "state_norm": norm(hidden),
            "embedding_norm": norm(hidden),
            "attention_norm": norm(hidden),
            "mlp_norm": norm(hidden),
            "norm": norm(hidden),
        }
        steps = torch.arange(0, size, 2, device="cuda") / size
        slots, capacity = self.features.shape[:2]
        cache = torch.zeros(
            2, slots, shape.key_value_heads, capacity, size, dtype=torch.half, device="cuda"
        )
        scratch = launcher.chain.facts.draft_scratch_bytes
        size = DRAFT_SEQUENCES * ctypes.sizeof(DraftOutcome)
        self._outcome = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        self._held = self.weights | {
            "frequencies": _ROTARY_BASE**-steps,
            "tokens": self.tokens.int(),
            "features": self.features,
            "keys": cache[0],
            "values": cache[1],
            "scratch": torch.zeros(scratch, dtype=torch.uint8, device="cuda"),
            "chosen": launcher.chosen,
            "outcome": self._outcome,
        }

    def make(
        self,
        slot: int,
        start: int,
        followed: Sequence[int],
        steps: int,
        races: Sequence[RowRace] = (),
    ) -> DraftSequence:
        """What takes in positions from `start` on, which `followed` follow, and drafts `steps`.

        races: by what each drafted token is sampled; the most probable ones are drafted without.
        """
        made = DraftSequence(slot=slot, start=start, rows=len(followed), steps=steps)
        made.verifying_row = -1
        made.token[: len(followed)] = followed
        made.acceptance = (ctypes.c_float * MARGIN_BINS)(*[1.0] * MARGIN_BINS)
        made.sampled = bool(races)
        for index, race in enumerate(races):
            made.race[index] = race
        return made

    def make_following(
        self,
        slot: int,
        start: int,
        drafted: Sequence[int],
        steps: int,
        row: int,
        races: Sequence[RowRace] = (),
    ) -> DraftSequence:
        """What follows a pass that verifies `drafted`, and before it, from `row` on, one token.

        races: of the tokens after the one that follows the first, whatever is accepted.
        """
        made = self.make(slot, start, [*drafted, 0], steps, races)
        made.verifying_row = row
        return made

    def taken_in(self, index: int) -> tuple[int, int]:
        """Of a sequence of the last launch: its positions, and the token after the last."""
        outcome = (DraftOutcome * DRAFT_SEQUENCES).from_address(self._outcome.data_ptr())[index]
        return outcome.rows, outcome.followed

    def launchable(self, sequences: Sequence[DraftSequence]) -> DraftPass:
        """The parameter of a launch for several sequences."""
        made = DraftPass(sequences=len(sequences))
        for name, tensor in self._held.items():
            setattr(made, name, tensor.data_ptr())
        made.features_of_position, made.draft_tokens = self.features.shape[2], len(self.tokens)
        made.norm_epsilon = _EPSILON
        for index, sequence in enumerate(sequences):
            made.sequence[index] = sequence
        return made

    def launch(self, sequences: Sequence[DraftSequence]) -> list[Drafted]:
        """Run a launch for several sequences: what it drafts for each."""
        self._launcher.draft(self.launchable(sequences))
        outcomes = (DraftOutcome * len(sequences)).from_address(self._outcome.data_ptr())
        return [
            (list(outcome.token[:count]), list(outcome.probability[:count]))
            for outcome in outcomes
            for count in [outcome.tokens]
        ]

    def draft(
        self,
        slot: int,
        followed: Sequence[int],
        steps: int,
        at_once: int = MAX_ROWS,
        races: Sequence[RowRace] = (),
    ) -> Drafted:
        """Take in all positions from 0 on, `at_once` at once, and draft."""
        at_once = min(at_once, self._launcher.chain.facts.draft_rows)
        drafted: Drafted = ([], [])
        for start in range(0, len(followed), at_once):
            piece = followed[start : start + at_once]
            last = start + len(piece) == len(followed)
            wanted = self.make(slot, start, piece, steps if last else 0, races)
            drafted = self.launch([wanted])[0]
        return drafted

    def logits(self, slot: int, followed: Sequence[int], drafted: Sequence[int]) -> Tensor:
        """PyTorch's logits before each of `drafted`, [drafted, draft vocabulary], in fp32."""
        weights = {name: weight.float() for name, weight in self.weights.items()}
        features = self.features[slot, : len(followed)].float()
        normed = [
            _norm(features[:, index], weights["feature_norms"][index])
            for index in range(features.shape[1])
        ]
        state = torch.cat(normed, -1) @ weights["combine"].T
        states, rows = state, []
        tokens = list(followed)
        for token in drafted:
            state = self._layer(weights, states, tokens)[-1:]
            rows.append(_norm(state, weights["norm"]) @ weights["head"].T)
            states, tokens = torch.cat([states, state]), [*tokens, token]
        return torch.cat(rows)

    def _layer(self, weights: dict[str, Tensor], states: Tensor, tokens: list[int]) -> Tensor:
        shape, count = self.shape, len(tokens)
        embedded = self._embedding[torch.tensor(tokens, device="cuda")]
        joined = [_norm(states, weights["state_norm"]), _norm(embedded, weights["embedding_norm"])]
        x = states + torch.cat(joined, -1) @ weights["join"].T
        projected = _norm(x, weights["attention_norm"]) @ weights["qkv"].T
        heads = projected.view(count, -1, shape.head_size).transpose(0, 1)
        turned = self._rotated(heads[: shape.heads + shape.key_value_heads])
        queries, keys = turned.split([shape.heads, shape.key_value_heads])
        group = shape.heads // shape.key_value_heads
        keys, values = (
            part.repeat_interleave(group, 0)
            for part in (keys, heads[shape.heads + shape.key_value_heads :])
        )
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + attended.transpose(0, 1).reshape(count, -1) @ weights["o"].T
        gate, up = (_norm(x, weights["mlp_norm"]) @ weights["gate_up"].T).chunk(2, -1)
        return x + (functional.silu(gate) * up) @ weights["down"].T

    def _rotated(self, heads: Tensor) -> Tensor:
        positions = torch.arange(heads.shape[1], device="cuda")
        angles = torch.outer(positions, self._held["frequencies"])
        first, second = heads.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, _EPSILON)
