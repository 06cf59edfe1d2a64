"""The time of each engine for one token, measured, and what a token costs by where it exits."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sedac_export.bundle.sessions import Engine, empty_cache
from sedac_export.exits.replay.replay import Replay
from sedac_runtime.choices import KvFill

_FILLED = 512
_REPEATS = 100


@dataclass(frozen=True)
class Costs:
    """Milliseconds for one token: of one layer, kv, exit engine, head and embed.

    waiting: how much longer a layer takes with one more token in its pass.
    """

    num_layers: int
    layer: float
    fill: float
    waiting: float
    exit: float
    head: float
    embed: float

    def skipped(self, kv_fill: KvFill) -> float:
        """A skipped layer: its kv engine, or one more token in a later token's pass."""
        return self.fill if kv_fill == "propagate" else self.waiting

    @property
    def full(self) -> float:
        """A token at full depth."""
        return self.embed + self.num_layers * self.layer + self.head

    def of(
        self, depths: npt.NDArray[np.int64], checks: npt.NDArray[np.int64], kv_fill: KvFill
    ) -> npt.NDArray[np.float64]:
        """Tokens that exit after `depths` layers with so many `checks` of exit engines, [n]."""
        skipped = self.skipped(kv_fill)
        fixed = self.embed + self.head + self.num_layers * skipped
        total: npt.NDArray[np.float64] = (
            fixed + depths * (self.layer - skipped) + checks * self.exit
        )
        return total


def measure_costs(replay: Replay) -> Costs:
    """Time a bundle's engines on one token, with a cache that is partly filled.

    Each is the least of several runs, which other load on the machine disturbs least.
    """
    manifest = replay.manifest
    length = max(2, min(_FILLED, manifest.max_cache_length))
    shared = _feeds(replay, length, 1)
    hidden = shared["x"]
    kv = manifest.key_value_heads[0]
    caches = {
        f"past_{kind}_0": empty_cache(kv.heads, length, kv.head_size) for kind in ("key", "value")
    }
    fill = replay.load(manifest.engines.key_value[0].file)
    layer = _least(replay.layers[0], shared, caches)
    stability = {"x": hidden, "stability": np.ones((1, 1, 3), dtype=np.float32)}
    return Costs(
        manifest.model.num_layers,
        layer=layer,
        fill=_least(fill, shared, caches),
        waiting=max(0.0, _least(replay.layers[0], _feeds(replay, length, 2), caches) - layer),
        exit=max((_least(engine, stability) for engine in replay.exits.values()), default=0.0),
        head=_least(replay.head, {"x": hidden}),
        embed=_least(replay.embed, _newest(length, 1)),
    )


def _feeds(replay: Replay, length: int, tokens: int) -> dict[str, Any]:
    """A layer's and a kv engine's inputs for the newest `tokens` of `length` positions."""
    shared: dict[str, Any] = replay.embed.run(_newest(length, tokens))
    hidden = replay.manifest.model.hidden_size
    return shared | {
        "x": np.full((1, tokens, hidden), 0.1, dtype=np.float32),
        "seqlens_k": np.array([length - 1], dtype=np.int32),
        "total_sequence_length": np.array(length, dtype=np.int32),
        "write_index": np.array([length - tokens], dtype=np.int64),
    }


def _newest(length: int, tokens: int) -> dict[str, Any]:
    positions = np.arange(length - tokens, length, dtype=np.int64)[None]
    return {"input_ids": np.zeros((1, tokens), dtype=np.int64), "position_ids": positions}


def _least(engine: Engine, feeds: dict[str, Any], caches: dict[str, Any] | None = None) -> float:
    """Milliseconds of the quickest of several runs, inputs and outputs bound before."""
    binding = engine.bind(feeds, caches)
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        engine.session.run_with_iobinding(binding)
        times.append(time.perf_counter() - started)
    return min(times) * 1e3
