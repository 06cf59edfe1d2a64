"""Run a target's plans on a GPU, to compare them."""

import tempfile
from pathlib import Path

import numpy as np
import onnx

from sedac_export.arrays import Array
from sedac_export.bundle.plan_entries import PlanSet, PortableGraphs
from sedac_export.tensorrt.profiles import most_tokens
from sedac_export.tensorrt.worker import Worker


class GpuPlanRunner:
    """Runs a target's plans on the GPU."""

    def __init__(
        self, directory: Path, portable: PortableGraphs, plans: PlanSet, length: int, worker: Worker
    ) -> None:
        self.directory, self.portable, self.worker = directory, portable, worker
        self.plans = {plan.graph: plan for plan in plans.plans}
        self.options, self.length = plans.options, length

    def __call__(self, graph: str, feeds: dict[str, Array]) -> dict[str, Array]:
        """Outputs of the plan of `graph`, floats as fp32, in the first profile that fits."""
        tokens = next(iter(feeds.values())).shape[1]
        most = most_tokens(self.options, self.length, head=graph == self.portable.head)
        profile = next(index for index, count in enumerate(most) if tokens <= count)
        known = {
            value.name
            for value in onnx.load(self.directory / graph, load_external_data=False).graph.input
        }
        with tempfile.TemporaryDirectory() as place:
            given, results = Path(place) / "feeds.npz", Path(place) / "results.npz"
            np.savez(given, allow_pickle=False, **{n: x for n, x in feeds.items() if n in known})
            self.worker.call(
                "run",
                plan=str(self.directory / self.plans[graph].file),
                profile=profile,
                feeds=str(given),
                results=str(results),
            )
            with np.load(results) as arrays:
                return dict(arrays)
