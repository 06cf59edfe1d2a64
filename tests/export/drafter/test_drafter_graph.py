"""The drafter's graphs compute what its PyTorch form does."""

import numpy as np
import onnx
import pytest
import torch
from transformers import DynamicCache

from sedac_export.arrays import Floats
from sedac_export.bundle.sessions import Engine
from sedac_export.drafter.draft_model import DrafterShape, DraftModel, rollout_mask
from sedac_export.drafter.drafter_graph import draft_graph, state_graph

SHAPE = DrafterShape(64, 96, 4, 2, 16, 10000.0, 1e-5, 200, (1, 2, 4))
SIZE = SHAPE.key_value_heads * SHAPE.head_size
CAPACITY = 24


@pytest.fixture(scope="module")
def drafter() -> DraftModel:
    torch.manual_seed(1)
    drafter = DraftModel(SHAPE).eval()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 1.0))
    return drafter


@pytest.fixture(scope="module")
def head() -> Floats:
    rows: Floats = np.random.default_rng(0).normal(0, 0.1, (50, 64)).astype(np.float32)
    return rows


def _exact(graph: onnx.ModelProto) -> bytes:
    """The graph with products of 8-bit weights computed in fp32."""
    for node in graph.graph.node:
        for attribute in list(node.attribute):
            if attribute.name == "accuracy_level":
                node.attribute.remove(attribute)
    exact: bytes = graph.SerializeToString()
    return exact


class _Rollout:
    """The ONNX drafter with a cache, as the runtime drives it."""

    def __init__(self, drafter: DraftModel, head: Floats) -> None:
        self.state = Engine(_exact(state_graph(drafter)))
        self.layer = Engine(_exact(draft_graph(drafter, head)))
        # what the cache holds beyond its end is nothing to attention
        self.cache = {
            name: np.full((1, CAPACITY, SIZE), 7.0, np.float32) for name in ("key", "value")
        }
        self.length = 0

    def step(self, state: Floats, embedding: Floats) -> tuple[Floats, Floats]:
        end = self.length + state.shape[1]
        outputs = self.layer.run(
            {
                "state": state,
                "embedding": embedding,
                "position_ids": np.arange(self.length, end)[None],
                "past_key": self.cache["key"],
                "past_value": self.cache["value"],
            }
        )
        for name, cache in self.cache.items():
            cache[:, self.length : end] = outputs[f"new_{name}"]
        self.length = end
        return outputs["next_state"], outputs["logits"]


def test_the_engines_roll_out_as_in_pytorch(drafter: DraftModel, head: Floats) -> None:
    torch.manual_seed(2)
    known, drafted = 9, 3
    features = [torch.randn(1, known, 64) for _ in SHAPE.feature_layers]
    embeddings = torch.randn(1, known + drafted, 64)
    with torch.no_grad():
        cache = DynamicCache()
        state = drafter.state_of(features)
        state = drafter(
            state,
            embeddings[:, :known],
            torch.arange(known)[None],
            rollout_mask(known, 0, state.device),
            cache,
        )[:, -1:]
        expected = [drafter.logits(state, torch.from_numpy(head))]
        for position in range(known, known + drafted):
            state = drafter(
                state,
                embeddings[:, position : position + 1],
                torch.tensor([[position]]),
                None,
                cache,
            )
            expected.append(drafter.logits(state, torch.from_numpy(head)))
    rollout = _Rollout(drafter, head)
    joined = torch.cat(features, -1).numpy()
    own = rollout.state.run({"features": joined})["state"]
    # the model's states come in two pieces
    rollout.step(own[:, :5], embeddings[:, :5].numpy())
    next_state, logits = rollout.step(own[:, 5:], embeddings[:, 5:known].numpy())
    given = [logits]
    for position in range(known, known + drafted):
        next_state, logits = rollout.step(
            next_state, embeddings[:, position : position + 1].numpy()
        )
        given.append(logits)
    for own_logits, wanted in zip(given, expected, strict=True):
        # weights are in 8 bits
        difference = own_logits[0] - wanted[0].numpy()
        assert np.sqrt((difference**2).mean()) < 0.03 * float(wanted.std())
