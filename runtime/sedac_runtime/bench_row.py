"""A row of a benchmark."""

from typing import TypedDict


class BenchRow(TypedDict):
    """The figures of one variant; `sedac_runtime.bench` describes the fields."""

    name: str
    ms_per_token: float
    tokens_per_second: float
    min_ms: float
    max_ms: float
    mean_exit_layer: float
    speedup: float
    agreement: float
