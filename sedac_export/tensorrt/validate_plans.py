"""`sedac-export validate`: what can be known of a bundle's plans on this host."""

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from sedac_export.bundle import Bundle
from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.agreement_row import GATES, Gates, failures
from sedac_export.bundle.plan_entries import PlanEntry, PlanSet, PortableGraphs
from sedac_export.bundle.portable_runner import PortableRunner
from sedac_export.bundle.target_check import TargetCheck, TargetValidation, run_checks
from sedac_export.console import StageProgress
from sedac_export.device_graphs.agreement import compare
from sedac_export.errors import SedacError
from sedac_export.tensorrt.build_plans import fingerprint
from sedac_export.tensorrt.installed import check_compatible
from sedac_export.tensorrt.plan_runner import GpuPlanRunner
from sedac_export.tensorrt.profiles import graph_profiles
from sedac_export.tensorrt.structure import Expected, expectations
from sedac_export.tensorrt.worker import Worker
from sedac_runtime.flavour import FLAVOURS, Target, find_gpu


def validate(
    directory: Path, target: Target, progress: StageProgress = lambda *_: None
) -> TargetValidation:
    """Check the plans of `target` in the bundle `directory`, as far as this host allows.

    structure: each plan is of the graph beside it and holds its layers, and the network that
    TensorRT parses from that has the inputs, outputs, dtypes, shapes, cache updates in place and
    attention that the bundle needs. onnxruntime: those graphs agree with the engines that the
    build compared with the original. execution: the plans themselves do, on this host's GPU.

    Raises SedacError when a file is damaged, there are no such plans or the flavour is missing.
    """
    manifest = Bundle.open(directory).manifest
    plans, portable = manifest.plans.get(target), manifest.portable
    if plans is None or portable is None:
        raise SedacError(
            f"{directory} holds no {target} engines; add them with"
            f" sedac-export engines {directory} --target {target} and --model"
        )
    with Worker(target) as worker:
        run = _PlanValidator(directory, manifest, portable, target, plans, worker)
        checks = run_checks(progress, run.structure, run.onnxruntime, run.execution)
    facts = plans.model_dump(exclude={"plans"})
    seconds = {Path(plan.file).stem: plan.seconds for plan in plans.plans}
    title = f"{FLAVOURS[target].title} {plans.version}"
    return TargetValidation(target, title, facts | {"build_seconds": seconds}, checks)


@dataclass
class _PlanValidator:
    directory: Path
    manifest: bundle.Manifest
    portable: PortableGraphs
    target: Target
    plans: PlanSet
    worker: Worker

    def __post_init__(self) -> None:
        self.expected = expectations(self.directory, self.manifest, self.portable)

    def structure(self) -> TargetCheck:
        check = TargetCheck("structure")
        built = {plan.graph: plan for plan in self.plans.plans}
        for graph, expected in self.expected.items():
            problems = self._graph_problems(graph, expected)
            problems += self._plan_problems(graph, built.get(graph))
            check.problems += [f"{Path(graph).stem}: {problem}" for problem in problems]
            check.engines.append({"engine": Path(graph).stem, "passed": not problems})
        return check

    def onnxruntime(self) -> TargetCheck:
        runner = PortableRunner(self.directory, self.manifest.device_precision())
        return self._agreement("onnxruntime", runner, GATES[runner.computes])

    def execution(self) -> TargetCheck:
        """Load each plan and run it, where there is a GPU that can."""
        gpu = find_gpu()
        if gpu is None:
            return TargetCheck.not_executed("no NVIDIA GPU with its driver is found on this host")
        try:
            check_compatible(self.target, self.plans, self.worker.call("version"), gpu)
        except SedacError as error:
            return TargetCheck.not_executed(str(error))
        problems = [problem for plan in self.plans.plans for problem in self._engine_problems(plan)]
        if problems:
            return TargetCheck("execution", problems=problems)
        length = self.manifest.max_cache_length
        runner = GpuPlanRunner(self.directory, self.portable, self.plans, length, self.worker)
        return self._agreement("execution", runner, GATES[self.manifest.device_precision()])

    def _agreement(
        self,
        name: Literal["onnxruntime", "execution"],
        runner: PortableRunner | GpuPlanRunner,
        gates: Gates,
    ) -> TargetCheck:
        try:
            rows = compare(self.directory, self.manifest, self.portable, runner, gates)
        except Exception as error:  # a graph broken so that it does not even run
            reason = " ".join(str(error).split())
            return TargetCheck(name, problems=[f"the engines do not run: {reason}"])
        return TargetCheck(name, problems=failures(rows), engines=rows)

    def _graph_problems(self, graph: str, expected: Expected) -> list[str]:
        try:
            network = self.worker.call("describe", graph=str(self.directory / graph))
        except SedacError as error:
            return [str(error)]
        return expected.problems(network)

    def _plan_problems(self, graph: str, plan: PlanEntry | None) -> list[str]:
        if plan is None:
            return ["it has no plan; run sedac-export engines again"]
        options, version = self.plans.options, self.plans.version
        present = fingerprint(self.directory, self.manifest, graph, version, options)
        if plan.fingerprint != present:
            return ["its plan is of another graph or other weights; run sedac-export engines again"]
        return self._missing_layers(graph, plan) if self.target == "tensorrt-rtx" else []

    def _missing_layers(self, graph: str, plan: PlanEntry) -> list[str]:
        """Layers that the file of a plan does not name."""
        with (
            (self.directory / plan.file).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return [
                f"its plan lacks the layer {layer}"
                for layer in self._cache_layers(graph)
                if data.find(layer.encode()) < 0
            ]

    def _cache_layers(self, graph: str) -> list[str]:
        """How engines name the layers that update caches and attend."""
        model = onnx.load(self.directory / graph, load_external_data=False)
        kinds = ("TensorScatter", "Attention")
        return [f"[ONNX Layer: {n.name}]" for n in model.graph.node if n.op_type in kinds]

    def _engine_problems(self, plan: PlanEntry) -> list[str]:
        """What the engine itself, asked on a GPU, says otherwise than it should."""
        try:
            engine = self.worker.call("inspect", plan=str(self.directory / plan.file))
        except SedacError as error:
            return [str(error)]
        problems = self.expected[plan.graph].problems(engine)
        problems += [
            f"its engine lacks the layer {layer}"
            for layer in self._cache_layers(plan.graph)
            if layer not in engine["information"]
        ]
        length = self.manifest.max_cache_length
        head = plan.graph == self.portable.head
        wanted = graph_profiles(self.directory / plan.graph, self.plans.options, length, head)
        for number, (shapes, found) in enumerate(zip(wanted, engine["profiles"], strict=False)):
            problems += [
                f"profile {number} takes {name} of {found.get(name)} instead of {shape}"
                for name, shape in shapes.items()
                if found.get(name) != shape
            ]
        if len(wanted) != len(engine["profiles"]):
            problems.append(f"{len(engine['profiles'])} profiles instead of {len(wanted)}")
        return [f"{Path(plan.file).stem}: {problem}" for problem in problems]
