"""Texts that a model writes, many at once.

transformers' `generate` is bound by the host: on a machine with an H200 a step of SmolLM2-135M took
93 ms for 1024 texts and 112 for 3840, which is 29 us a text. Here shapes and addresses stay the
same from step to step, so that a GPU replays one as a CUDA graph: 16 to 17 us a text.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from sedac_export.model.decoder import cache_argument

# steps after which the host asks whether all texts have ended
STEPS_BETWEEN_CHECKS = 16
# any token: nothing sees it
PADDING = 0


@torch.no_grad()
def write_texts(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    most: int,
    temperature: float,
    ends: Sequence[int],
) -> list[list[int]]:
    """What follows each of `prompts`, up to `most` tokens, the one of `ends` that ends it included.

    prompts: at least one, of any lengths. temperature: 0 takes the most probable token; otherwise
    all tokens are sampled from. Raises SedacError where the model takes no cache.
    """
    batch = _Batch(model, prompts, most, temperature, ends)
    step = batch.prepare_step() if most > 1 else batch.step
    for count in range(batch.steps, most):
        if count % STEPS_BETWEEN_CHECKS == 0 and bool(batch.ended.all()):
            break
        step()
    return [_until_end(row, ends) for row in batch.written.tolist()]


class _Batch:
    """The state of texts under way, which a step changes in place. steps: tokens of each so far."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[list[int]],
        most: int,
        temperature: float,
        ends: Sequence[int],
    ) -> None:
        device = model.device
        tokens, known = _left_padded(prompts, device)
        texts, width = tokens.shape
        self.model, self.temperature = model, temperature
        # positions to come count as known: causality hides them
        self.mask = torch.ones(texts, width + most, dtype=torch.bool, device=device)
        self.mask[:, :width] = known
        # other models do not take a cache that is longer than the text
        self.is_fixed = model._can_compile_fullgraph
        self.cache = _cache(model, width + most if self.is_fixed else None)
        arguments = inspect.signature(model.forward).parameters
        self.cache_name = cache_argument(arguments)
        self.few = {"logits_to_keep": 1} if "logits_to_keep" in arguments else {}
        self.ends = torch.tensor(ends, device=device)
        self.written = torch.full((texts, most), PADDING, device=device)
        self.ended = torch.zeros(texts, dtype=torch.bool, device=device)
        self.newest = torch.zeros(texts, 1, dtype=torch.long, device=device)
        self.index = torch.zeros(1, dtype=torch.long, device=device)
        positions = (known.cumsum(1) - 1).clamp(min=0)
        self.position = positions[:, -1:].clone()
        self._take(self._run(tokens, positions))
        self.steps = 1

    def prepare_step(self) -> Callable[[], None]:
        """What takes a step; at most one is taken here."""
        if self.model.device.type != "cuda" or not self.is_fixed:
            return self.step
        # libraries that the first step sets up cannot be set up in a graph
        self.step()
        self.steps += 1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def step(self) -> None:
        """The next token of each text."""
        self._take(self._run(self.newest, self.position))

    def _run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits after the last of `tokens`; both [texts, n]."""
        mask = self.mask
        if not self.is_fixed:
            mask = mask[:, : self.cache.get_seq_length() + tokens.shape[1]]
        model: Any = self.model
        logits: Tensor = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self.cache_name: self.cache},
            **self.few,
        ).logits
        return logits[:, -1]

    def _take(self, logits: Tensor) -> None:
        """Choose by `logits` [texts, vocabulary]."""
        # what follows an end is no part of the text
        chosen = self._choose(logits).masked_fill(self.ended, PADDING)
        self.ended |= (chosen[:, None] == self.ends).any(1)
        self.written.index_copy_(1, self.index, chosen[:, None])
        self.newest.copy_(chosen[:, None])
        self.index += 1
        self.position += 1

    def _choose(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        # the least of exponential times over probabilities is a sample: torch.multinomial waits
        probabilities = (logits.float() / self.temperature).softmax(-1)
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def _cache(model: PreTrainedModel, length: int | None) -> Cache:
    """One that grows, or of `length` positions, of which a step changes nothing on the host."""
    if length is None:
        return DynamicCache(config=model.config)
    cache = StaticCache(config=model.config, max_cache_len=length)
    # layers with a window count positions on the host, as a graph would not; masks have the window
    cache.layers = [StaticLayer(length) for _ in cache.layers]
    return cache


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:length]


def _left_padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [rows, longest], and which of them are tokens."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), PADDING)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = True
    return tokens.to(device), mask.to(device)
