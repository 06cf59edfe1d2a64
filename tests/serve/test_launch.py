"""What bundles are served with."""

from pathlib import Path

import pytest
from conftest import THREADS

pytest.importorskip("fastapi", reason="of the extra sedac-runtime[serve]")

from sedac_runtime import SedacModel
from sedac_runtime.serve.launch import SchedulerSettings, serve_model
from sedac_runtime.serve.server_metrics import ServerMetrics


@pytest.mark.parametrize(("max_sequences", "capacity"), [(None, 8 + 5), (3, 3 + 5)])
def test_requests_run_and_wait_up_to_a_capacity(
    demo_bundle: Path, max_sequences: int | None, capacity: int
) -> None:
    """A model runs as many sequences at once as suit its backend, unless it is told how many."""
    model = SedacModel.from_pretrained(demo_bundle, threads=THREADS)
    scheduling = SchedulerSettings(max_sequences, max_queue=5, cache_tokens=None)
    served = serve_model("demo", model, ServerMetrics(model.num_layers), scheduling)
    assert served.engine.capacity == capacity


def test_no_model_takes_the_memory_of_the_others() -> None:
    chosen = SchedulerSettings(None, max_queue=5, cache_tokens=None)
    assert chosen.among(1) == chosen
    assert chosen.among(2) == SchedulerSettings(8, max_queue=5, cache_tokens=None)
    asked_for = SchedulerSettings(64, max_queue=5, cache_tokens=None)
    assert asked_for.among(2) == asked_for
