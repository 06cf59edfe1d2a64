"""`sedac-export validate --target onnxruntime-cuda`: what can be known on this host."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
import onnxruntime

from sedac_export.bundle import Bundle
from sedac_export.bundle.agreement_row import GATES, failures
from sedac_export.bundle.manifest import EngineFiles
from sedac_export.bundle.plan_entries import PortableGraphs
from sedac_export.bundle.portable_runner import PortableRunner
from sedac_export.bundle.sessions import CPU, CUDA
from sedac_export.bundle.target_check import TargetCheck, TargetValidation, run_checks
from sedac_export.console import StageProgress
from sedac_export.device_graphs.agreement import compare
from sedac_export.device_graphs.onnxruntime_cuda import TARGET
from sedac_export.errors import SedacError
from sedac_runtime.flavour import find_gpu

# what the host decides, or other engines give
_OPTIONAL = {"stability", "risk"}


def validate(directory: Path, progress: StageProgress = lambda *_: None) -> TargetValidation:
    """Check the graphs for ONNX Runtime's CUDA provider in the bundle `directory`.

    structure: each graph gives what the bundle's own engine in its place gives. onnxruntime: run by
    the CPU provider, they agree with these engines, which the build compared with the original.
    execution: run by the CUDA provider they do, where there is a GPU and a library with it.

    Raises SedacError when a file is damaged or there are no such graphs.
    """
    bundle = Bundle.open(directory)
    graphs = bundle.manifest.onnxruntime_cuda
    if graphs is None:
        raise SedacError(
            f"{directory} holds no {TARGET} engines; add them with sedac-export engines"
            f" {directory} --target {TARGET} and --model"
        )
    run = _GraphValidator(bundle, graphs)
    checks = run_checks(progress, run.structure, run.onnxruntime, run.execution)
    facts = {"version": onnxruntime.__version__, "precision": bundle.manifest.precision}
    title = f"graphs for ONNX Runtime's CUDA provider, checked with {onnxruntime.__version__}"
    return TargetValidation(TARGET, title, facts, checks)


@dataclass
class _GraphValidator:
    bundle: Bundle
    graphs: PortableGraphs

    def structure(self) -> TargetCheck:
        check = TargetCheck("structure")
        graphs = _without_contexts(self.graphs)
        engines = _without_contexts(self.bundle.manifest.engines)
        if len(graphs) != len(engines):
            check.problems.append(f"{len(graphs)} graphs for {len(engines)} engines")
        for graph, engine in zip(graphs, engines, strict=False):
            given, wanted = self._outputs(graph), self._outputs(engine)
            lacking = sorted(wanted - given - _OPTIONAL)
            if lacking:
                check.problems.append(f"{Path(graph).stem}: it does not give {', '.join(lacking)}")
            check.engines.append({"engine": Path(graph).stem, "passed": not lacking})
        return check

    def onnxruntime(self) -> TargetCheck:
        return self._agreement("onnxruntime", CPU)

    def execution(self) -> TargetCheck:
        """Run the graphs on the GPU, where there is one."""
        if find_gpu() is None:
            return TargetCheck.not_executed("no NVIDIA GPU with its driver is found on this host")
        if CUDA not in onnxruntime.get_available_providers():
            reason = "this onnxruntime has no CUDA provider; install onnxruntime-gpu in its place"
            return TargetCheck("execution", checked=False, reason=reason)
        return self._agreement("execution", CUDA)

    def _agreement(self, name: Literal["onnxruntime", "execution"], provider: str) -> TargetCheck:
        directory, manifest = self.bundle.directory, self.bundle.manifest
        runner = PortableRunner(directory, manifest.precision, provider)
        gates = GATES[runner.computes]
        try:
            rows = compare(directory, manifest, self.graphs, runner, gates)
        except Exception as error:  # a graph broken so that it does not even run
            reason = " ".join(str(error).split())
            return TargetCheck(name, problems=[f"the engines do not run: {reason}"])
        return TargetCheck(name, problems=failures(rows), engines=rows)

    def _outputs(self, file: str) -> set[str]:
        model = onnx.load(self.bundle.path(file), load_external_data=False)
        return {value.name for value in model.graph.output}


def _without_contexts(engines: EngineFiles | PortableGraphs) -> list[str]:
    """The engines that either form has, in one order."""
    layers = [entry.file for entry in engines.layers]
    key_value = [entry if isinstance(entry, str) else entry.file for entry in engines.key_value]
    return [engines.embed, *layers, *key_value, engines.head]
