"""The time of each engine for one token, measured, and what a token costs by where it exits."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sedac_export.replay import Replay
from sedac_export.sessions import Engine, empty_cache

_FILLED = 512
_REPEATS = 100


@dataclass(frozen=True)
class Costs:
    """Milliseconds for one token: of one layer, kv, exit engine, head and embed."""

    num_layers: int
    layer: float
    fill: float
    exit: float
    head: float
    embed: float

    @property
    def full(self) -> float:
        """A token at full depth."""
        return self.embed + self.num_layers * self.layer + self.head

    def of(
        self, depths: npt.NDArray[np.int64], checks: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Tokens that exit after `depths` layers with so many `checks` of exit engines, [n].

        A skipped layer costs filling its cache.
        """
        fixed = self.embed + self.head + self.num_layers * self.fill
        total: npt.NDArray[np.float64] = (
            fixed + depths * (self.layer - self.fill) + checks * self.exit
        )
        return total


def measure_costs(replay: Replay) -> Costs:
    """Time a bundle's engines on one token, with a cache that is partly filled.

    Each is the least of several runs, which other load on the machine disturbs least.
    """
    manifest = replay.manifest
    hidden = np.full((1, 1, manifest.model.hidden_size), 0.1, dtype=np.float32)
    length = min(_FILLED, manifest.max_cache_length)
    shared = replay.embed.run(_first_token(length))
    shared |= {
        "x": hidden,
        "seqlens_k": np.array([length - 1], dtype=np.int32),
        "total_sequence_length": np.array(length, dtype=np.int32),
        "write_index": np.array([length - 1], dtype=np.int64),
    }
    kv = manifest.key_value_heads[0]
    caches = {
        f"past_{kind}_0": empty_cache(kv.heads, length, kv.head_size) for kind in ("key", "value")
    }
    fill = Engine(replay.directory / manifest.engines.key_value[0].file, replay.threads)
    stability = {"x": hidden, "stability": np.ones((1, 1, 3), dtype=np.float32)}
    return Costs(
        manifest.model.num_layers,
        layer=_least(replay.layers[0], shared, caches),
        fill=_least(fill, shared, caches),
        exit=max((_least(engine, stability) for engine in replay.exits.values()), default=0.0),
        head=_least(replay.head, {"x": hidden}),
        embed=_least(replay.embed, _first_token(length)),
    )


def _first_token(length: int) -> dict[str, Any]:
    position = np.array([[length - 1]], dtype=np.int64)
    return {"input_ids": np.zeros((1, 1), dtype=np.int64), "position_ids": position}


def _least(engine: Engine, feeds: dict[str, Any], caches: dict[str, Any] | None = None) -> float:
    """Milliseconds of the quickest of several runs, inputs and outputs bound before."""
    binding = engine.bind(feeds, caches)
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        engine.session.run_with_iobinding(binding)
        times.append(time.perf_counter() - started)
    return min(times) * 1e3
