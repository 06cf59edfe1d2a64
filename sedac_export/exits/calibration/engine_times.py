"""The time of each engine for one token, measured, and what a token costs by where it exits."""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sedac_export.arrays import Array
from sedac_export.bundle.runner import BundleRunner
from sedac_export.bundle.sessions import Caches, Engine
from sedac_export.exits.replay.replay import Replay
from sedac_runtime.choices import KvFill

_FILLED = 512
_REPEATS = 100


@dataclass(frozen=True)
class EngineTimes:
    """Milliseconds for one token: of one layer, kv, exit engine, lens, head, embed with contexts.

    waiting: how much longer a layer takes with one more token in its pass.
    """

    num_layers: int
    layer: float
    fill: float
    waiting: float
    exit: float
    lens: float
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
        """Tokens that exit after `depths` layers with `checks` runs of exit engines each, [n]."""
        skipped = self.skipped(kv_fill)
        fixed = self.embed + self.head + self.num_layers * skipped
        total: npt.NDArray[np.float64] = (
            fixed
            + depths * (self.layer - skipped)
            + checks * self.exit
            + (depths < self.num_layers) * self.lens
        )
        return total


def measure_engine_times(replay: Replay) -> EngineTimes:
    """Time a bundle's engines on one token, with a cache that is partly filled.

    Each is the minimum of several runs, the one least affected by other load on the machine.
    """
    runner, manifest = replay.runner, replay.manifest
    engines = manifest.engines
    length = max(2, min(_FILLED, manifest.max_cache_length))
    one, two = _feeds(runner, length, 1), _feeds(runner, length, 2)
    caches = runner.empty_caches(0, 1, length)
    layer = runner.load(engines.layers[0].file)
    layer_time = _least(layer, one, caches)
    return EngineTimes(
        manifest.model.num_layers,
        layer=layer_time,
        fill=_least(runner.load(engines.key_value[0].file), one, caches),
        waiting=max(0.0, _least(layer, two, caches) - layer_time),
        exit=max((_least(runner.load(e.file), one) for e in engines.exits), default=0.0),
        lens=max((_least(runner.load(e.lens), one) for e in engines.exits if e.lens), default=0.0),
        head=_least(runner.load(engines.head), one),
        embed=sum(_least(runner.load(f), one) for f in (engines.embed, engines.contexts) if f),
    )


def _feeds(runner: BundleRunner, length: int, tokens: int) -> dict[str, Array]:
    """Every engine's inputs for the newest `tokens` of `length` positions."""
    hidden = runner.manifest.model.hidden_size
    return runner.begin(slice(length - tokens, length)).arrays | {
        "input_ids": np.zeros((1, tokens), dtype=np.int64),
        "x": np.full((1, tokens, hidden), 0.1, dtype=np.float32),
        "stability": np.ones((1, tokens, 3), dtype=np.float32),
    }


def _least(engine: Engine, feeds: dict[str, Array], caches: Caches | None = None) -> float:
    """Milliseconds of the quickest of several runs, inputs and outputs bound before."""
    binding = engine.bind(feeds, caches)
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        engine.session.run_with_iobinding(binding)
        times.append(time.perf_counter() - started)
    return min(times) * 1e3
