"""Run SEDAC bundles: per-layer engines under a Rust loop with early exit."""

from sedac_runtime._core import (
    BundleError,
    EngineError,
    InputError,
    SedacError,
    Thresholds,
    exits_by_risk,
    exits_by_stability,
)
from sedac_runtime.bench import bench
from sedac_runtime.model import GenerationOutput, GenerationStream, SedacModel, TokenOutput
from sedac_runtime.peer_comparison import bench_peers

__all__ = [
    "BundleError",
    "EngineError",
    "GenerationOutput",
    "GenerationStream",
    "InputError",
    "SedacError",
    "SedacModel",
    "Thresholds",
    "TokenOutput",
    "bench",
    "bench_peers",
    "exits_by_risk",
    "exits_by_stability",
]
