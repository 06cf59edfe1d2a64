"""A decoder with random weights, and what it computes in PyTorch in fp32."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from chain_weights import FORMATS, WeightFormat
from torch import Tensor
from torch.nn import functional

from sedac_export.bundle.cuda_entry import ChainOptions, ChainShape
from sedac_export.cuda.compiler import chain_macros
from sedac_export.exits.replay.probes import RISK_WIDTH, LearnedProbe, LREProbe

_ROTARY_BASE = 1e6


@dataclass
class History:
    """A sequence's cache before a pass: [key-value heads, positions, head size] by layer."""

    positions: int
    keys: list[Tensor]
    values: list[Tensor]


@dataclass(frozen=True)
class ReferenceOutput:
    """Of each token: logits, the hidden state, and the stability of each layer [layers, tokens]."""

    logits: Tensor
    hidden: Tensor
    stabilities: Tensor


@dataclass(frozen=True)
class ChainCase:
    """A model's shape, and the caches and position that its chain is tried with.

    vectors are the norms and biases that its layers have; window is the number of positions that a
    token sees, 0 for all; weights is the name of their format in chain_weights.
    """

    name: str
    shape: ChainShape
    options: ChainOptions
    vectors: tuple[str, ...]
    window: int = 0
    capacity: int = 1024
    position: int = 511
    weights: str = "fp16"

    def macros(self) -> dict[str, str]:
        """What its chain is compiled with."""
        return chain_macros(self.shape, self.options, 1, self.vectors, self.format.blocks)

    @property
    def format(self) -> WeightFormat:
        """What becomes of its matrices."""
        return FORMATS[self.weights]


class RandomDecoder:
    """Random weights. A layer is generated from its seed at every call, so that no copy is held."""

    def __init__(self, case: ChainCase, device: str = "cuda") -> None:
        self.case, self.shape, self.options = case, case.shape, case.options
        self.device = device
        self.final_norm = 1 + 0.1 * self._random(self._generator(-1), self.shape.hidden)

    def embedding(self) -> Tensor:
        """[vocabulary, hidden], fp16; also the head's matrix, whose logits are some 8 apart."""
        sizes = self.shape.vocabulary, self.shape.hidden
        numbers = self._random(self._generator(-2), *sizes)
        return (numbers * 8 * self.shape.hidden**-0.5).half()

    def rounded(self, matrix: Tensor) -> Tensor:
        """A matrix as the kernel computes with it, fp32."""
        return self.case.format.rounded(matrix)

    def layer(self, index: int) -> dict[str, Tensor]:
        """A layer's matrices qkv, o, gate, up and down in fp16, and its vectors in fp32."""
        generator = self._generator(index)
        weights = {
            name: (self._random(generator, rows, columns) * columns**-0.5).half()
            for name, (rows, columns) in self._matrix_sizes().items()
        }
        for name in self.case.vectors:
            numbers = 0.1 * self._random(generator, self._vector_size(name))
            weights[name] = numbers if name.endswith("_bias") else 1 + numbers
        return weights

    def probe(self, depth: int) -> dict[str, Tensor]:
        """An entropy probe as sedac_export.exits.replay.probes.LREProbe has them, fp32."""
        generator = self._generator(-1000 - depth)
        sizes = {
            "down.weight": (RISK_WIDTH, self.shape.hidden),
            "norm.weight": (RISK_WIDTH,),
            "norm.bias": (RISK_WIDTH,),
            "up.weight": (1, RISK_WIDTH),
            "up.bias": (1,),
        }
        return {name: 0.2 * self._random(generator, *size) for name, size in sizes.items()}

    def risk(self, depth: int, hidden: Tensor) -> Tensor:
        """What that probe gives for hidden states [tokens, hidden]: [tokens]."""
        probe = LREProbe(self.shape.hidden).to(self.device)
        probe.load_state_dict(self.probe(depth))
        risks: Tensor = probe(hidden)
        return risks[:, 0]

    def lens(self, depth: int) -> dict[str, Tensor]:
        """A lens as sedac_export.exits.training.lens has them, fp32."""
        generator, size = self._generator(-2000 - depth), self.shape.hidden
        matrix = 0.3 * size**-0.5 * self._random(generator, size, size)
        matrix += torch.eye(size, device=self.device)
        return {"weight": matrix, "bias": 0.1 * self._random(generator, size)}

    def through_lens(self, depth: int, hidden: Tensor) -> Tensor:
        """Hidden states as that lens shows them."""
        lens = self.lens(depth)
        return functional.linear(hidden, lens["weight"], lens["bias"])

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states [tokens, hidden]."""
        logits = self._norm(hidden, self.final_norm) @ self.rounded(self.embedding()).T
        return _soft_capped(logits, self.options.logits_softcap)

    def learned_probe(self, depth: int) -> LearnedProbe:
        """An exit head's probe, whose scalars count."""
        generator = self._generator(-3000 - depth)
        probe = LearnedProbe(self.shape.hidden).to(self.device).eval()
        for parameter in probe.parameters():
            size = 0.5 * parameter.shape[-1] ** -0.5
            parameter.data = size * self._random(generator, *parameter.shape)
        return probe

    def exit_signals(
        self, depth: int, hidden: Tensor, tokens: Tensor, stabilities: Tensor
    ) -> Tensor:
        """Margin, learned and entropy [rows, 3] of hidden states [rows, hidden] after `depth`.

        tokens: those that the exit head knows; stabilities: of the last three layers [rows, 3].
        """
        logs = self.head(hidden)[:, tokens].log_softmax(-1)
        top, minus_entropy = logs.topk(2).values, (logs.exp() * logs).sum(-1, keepdim=True)
        scalars = torch.cat([top, top.exp(), minus_entropy, stabilities], -1)
        normed = self._norm(hidden, self.final_norm)
        learned = self.learned_probe(depth)(normed, scalars).sigmoid()
        return torch.cat([top[:, :1].exp() - top[:, 1:].exp(), learned, -minus_entropy], -1)

    def rotary_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [positions, rotary size / 2]."""
        size = self.shape.rotary_size
        steps = torch.arange(0, size, 2, device=self.device) / size
        angles = torch.outer(torch.arange(positions, device=self.device), _ROTARY_BASE**-steps)
        return angles.cos(), angles.sin()

    def history(self, positions: int, seed: int) -> History:
        """A random cache that holds `positions` positions, rounded to fp16."""
        generator = self._generator(-2 - seed)
        sizes = self.shape.key_value_heads, positions, self.shape.head_size
        keys, values = (
            [self._random(generator, *sizes).mul(0.5).half() for _ in range(self.shape.layers)]
            for _ in range(2)
        )
        return History(positions, keys, values)

    def compute(
        self, history: History, tokens: Sequence[int], depth: int | None = None
    ) -> ReferenceOutput:
        """The head's logits after `depth` layers, by default all, of tokens that follow."""
        hidden = self.rounded(self.embedding())[torch.tensor(tokens, device=self.device)]
        hidden *= self.options.embedding_scale
        stabilities = []
        for index in range(depth or self.shape.layers):
            before, hidden = hidden, self._run_layer(index, hidden, history)
            cosine = functional.cosine_similarity(before, hidden, dim=-1)
            stabilities.append((cosine + 1) / 2)
        return ReferenceOutput(self.head(hidden), hidden, torch.stack(stabilities))

    def project(
        self, weights: dict[str, Tensor], hidden: Tensor, position: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [heads, tokens, head size] of tokens from `position` on."""
        shape = self.shape
        normalised = self._norm(hidden, weights["attention_norm"])
        projected = normalised @ self.rounded(weights["qkv"]).T + weights["qkv_bias"]
        heads = projected.view(len(hidden), -1, shape.head_size).transpose(0, 1)
        keys_end = shape.heads + shape.key_value_heads
        queries, keys, values = (
            heads[: shape.heads],
            heads[shape.heads : keys_end],
            heads[keys_end:],
        )
        if "query_norm" in weights:
            queries = self._norm(queries, weights["query_norm"])
            keys = self._norm(keys, weights["key_norm"])
        return self._rotated(queries, position), self._rotated(keys, position), values

    def _run_layer(self, index: int, hidden: Tensor, history: History) -> Tensor:
        weights = self.layer(index)
        attended = self._attend(index, weights, hidden, history) @ self.rounded(weights["o"]).T
        if "attention_post_norm" in weights:
            attended = self._norm(attended, weights["attention_post_norm"])
        hidden = hidden + attended
        normalised = self._norm(hidden, weights["mlp_norm"])
        gate, up = (normalised @ self.rounded(weights[name]).T for name in ("gate", "up"))
        if self.options.activation == "silu":
            gate = functional.silu(gate)
        else:
            gate = functional.gelu(gate, approximate="tanh")
        output = (gate * up) @ self.rounded(weights["down"]).T
        if "mlp_post_norm" in weights:
            output = self._norm(output, weights["mlp_post_norm"])
        return hidden + output

    def _attend(
        self, index: int, weights: dict[str, Tensor], hidden: Tensor, history: History
    ) -> Tensor:
        """[tokens, heads * head size]."""
        start, tokens, shape = history.positions, len(hidden), self.shape
        queries, keys, values = self.project(weights, hidden, start)
        # caches hold fp16
        keys = torch.cat([history.keys[index], keys.half()], 1).float()
        values = torch.cat([history.values[index], values.half()], 1).float()
        grouped = queries.reshape(shape.key_value_heads, -1, tokens, shape.head_size)
        scores = torch.einsum("hgtd,hsd->hgts", grouped, keys) * self.options.attention_scale
        scores = _soft_capped(scores, self.options.attention_softcap)
        positions = torch.arange(start + tokens, device=self.device)
        own = positions[start:, None]
        hides = positions > own
        if self.case.window:
            hides |= positions <= own - self.case.window
        probabilities = scores.masked_fill(hides, float("-inf")).softmax(-1)
        attended = torch.einsum("hgts,hsd->thgd", probabilities, values)
        return attended.reshape(tokens, -1)

    def _rotated(self, heads: Tensor, position: int) -> Tensor:
        size = self.shape.rotary_size
        tables = self.rotary_tables(position + heads.shape[1])
        cos, sin = (table[position:] for table in tables)
        first, second = heads[..., :size].chunk(2, -1)
        rest = heads[..., size:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self.options.norm_epsilon)

    def _matrix_sizes(self) -> dict[str, tuple[int, int]]:
        shape = self.shape
        attended = shape.heads * shape.head_size
        return {
            "qkv": (attended + 2 * shape.key_value_heads * shape.head_size, shape.hidden),
            "o": (shape.hidden, attended),
            "gate": (shape.intermediate, shape.hidden),
            "up": (shape.intermediate, shape.hidden),
            "down": (shape.hidden, shape.intermediate),
        }

    def _vector_size(self, name: str) -> int:
        if name in ("query_norm", "key_norm"):
            return self.shape.head_size
        return self._matrix_sizes()["qkv"][0] if name == "qkv_bias" else self.shape.hidden

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(1_000_000 + seed)

    def _random(self, generator: torch.Generator, *sizes: int) -> Tensor:
        return torch.randn(*sizes, device=self.device, generator=generator)


def _soft_capped(numbers: Tensor, cap: float) -> Tensor:
    return (numbers / cap).tanh() * cap if cap else numbers
