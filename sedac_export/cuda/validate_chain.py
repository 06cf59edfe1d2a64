"""`sedac-export validate --target cuda`: what can be known of a bundle's chain on this host."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sedac_export.bundle import Bundle
from sedac_export.bundle.agreement_row import GATES, failures
from sedac_export.bundle.cuda_entry import ChainModule, CudaChain
from sedac_export.bundle.target_check import TargetCheck, TargetValidation, run_checks
from sedac_export.console import StageProgress
from sedac_export.cuda.chain_abi import MAX_ROWS
from sedac_export.cuda.chain_agreement import compare
from sedac_export.cuda.recomputed_chain import agreement
from sedac_export.errors import SedacError
from sedac_runtime.flavour import find_gpu

if TYPE_CHECKING:
    from sedac_export.cuda.gpu_chain import GpuChain

# tokens that run in passes of all sizes; prefill takes more of them than a block of it does
BIT_TOKENS = 80


def validate(directory: Path, progress: StageProgress = lambda *_: None) -> TargetValidation:
    """Check the chain of the bundle `directory`, as far as this host allows.

    structure: the compiled files are for what the manifest says and take the registers and shared
    memory that it says, and the packed weights are the bundle's own. onnxruntime: what they give,
    computed on the CPU, agrees with the engines that the build compared with the original.
    execution: what the kernel gives does, layer by layer and end to end, and a token's logits are
    the same bits in passes of all sizes, on this host's GPU.

    Raises SedacError when a file is damaged, there is no chain or the extra cuda is missing.
    """
    bundle = Bundle.open(directory)
    chain = bundle.manifest.cuda
    if chain is None:
        refusal = bundle.manifest.cuda_refusal
        remedy = f"add it with sedac-export engines {directory} --target cuda and --model"
        raise SedacError(
            f"{directory} holds no cuda engines" + (f": {refusal}" if refusal else f"; {remedy}")
        )
    run = _ChainValidator(bundle, chain)
    checks = run_checks(progress, run.structure, run.onnxruntime, run.execution)
    facts = {"version": chain.compiler} | chain.model_dump(include={"fingerprint", "modules"})
    return TargetValidation("cuda", f"CUDA chain of NVRTC {chain.compiler}", facts, checks)


def choose_module(modules: Sequence[ChainModule], capability: str) -> ChainModule | None:
    """The module for a GPU of a compute capability such as 9.0, as the runtime chooses it.

    The newest machine code that the GPU runs, or else PTX.
    """
    wanted = _number(capability.replace(".", ""))

    def runs(module: ChainModule) -> bool:
        kind, _, number = module.architecture.partition("_")
        architecture = _number(number)
        return architecture <= wanted and (kind == "compute" or architecture[0] == wanted[0])

    def rank(module: ChainModule) -> tuple[bool, tuple[int, int]]:
        kind, _, number = module.architecture.partition("_")
        return kind == "sm", _number(number)

    return max(filter(runs, modules), key=rank, default=None)


@dataclass
class _ChainValidator:
    bundle: Bundle
    chain: CudaChain

    def structure(self) -> TargetCheck:
        try:
            from sedac_export.cuda.chain_structure import module_problems, weight_problems
        except ImportError as error:
            raise SedacError(
                "validate needs pyelftools to read the chain's machine code; pip install"
                " 'sedac[cuda]'"
            ) from error
        found = {
            m.file: module_problems(self.bundle, m, self.chain.block_bytes)
            for m in self.chain.modules
        }
        found[self.chain.weights] = weight_problems(self.bundle, self.chain)
        check = TargetCheck("structure")
        for file, problems in found.items():
            name = Path(file).stem
            check.problems += [f"{name}: {problem}" for problem in problems]
            check.engines.append({"engine": name, "passed": not problems})
        return check

    def onnxruntime(self) -> TargetCheck:
        rows = agreement(self.bundle, self.chain, self.bundle.path(self.chain.weights))
        return TargetCheck("onnxruntime", problems=failures(rows), engines=rows)

    def execution(self) -> TargetCheck:
        """Run the kernel, where there is a GPU that can."""
        gpu = find_gpu()
        if gpu is None:
            return TargetCheck.not_executed("no NVIDIA GPU with its driver is found on this host")
        module = choose_module(self.chain.modules, gpu.compute_capability)
        if module is None:
            built = ", ".join(module.architecture for module in self.chain.modules)
            return TargetCheck.not_executed(
                f"the chain is for {built} and {gpu.name} has {gpu.compute_capability}; build it"
                " again with sedac-export engines --target cuda"
            )
        return self._execute(module)

    def _execute(self, module: ChainModule) -> TargetCheck:
        from sedac_export.cuda.gpu_chain import GpuChain
        from sedac_export.cuda.gpu_memory import GpuMemory
        from sedac_export.cuda.loaded_chain import UnsupportedGpuError

        try:
            with GpuMemory() as memory:
                runner = GpuChain(self.bundle, self.chain, module, memory)
                gates = GATES[self.bundle.manifest.device_precision()]
                rows = compare(self.bundle, runner, gates)
                problems = failures(rows) + self._bit_problems(runner)
                return TargetCheck("execution", problems=problems, engines=rows)
        except UnsupportedGpuError as error:
            return TargetCheck.not_executed(str(error))
        except SedacError as error:
            return TargetCheck("execution", problems=[f"the chain does not run: {error}"])

    def _bit_problems(self, runner: "GpuChain") -> list[str]:
        """Whether tokens have other logits verified, prefilled or batched than decoded."""
        count = min(BIT_TOKENS, self.bundle.manifest.max_cache_length)
        tokens = np.arange(count) % self.chain.shape.vocabulary
        layers = self.chain.shape.layers
        # first, while the caches hold other tokens' entries
        prefilled = runner.run_prefilled(tokens) if count > MAX_ROWS else None
        batched = runner.run_batched(tokens)
        logits = [runner.run(tokens, 0, layers, rows).values for rows in (8, 4, 2, 1)]
        if not all(np.array_equal(one, logits[0]) for one in logits):
            return ["a token's logits are other bits in passes of other sizes"]
        if prefilled is not None and not np.array_equal(prefilled, logits[0][-MAX_ROWS:]):
            return ["a token's logits are other bits where the tokens before it are prefilled"]
        if not np.array_equal(batched, logits[0]):
            return ["a token's logits are other bits in a batch than in a pass"]
        return []


def _number(digits: str) -> tuple[int, int]:
    """Major and minor number of an architecture, such as 12 and 0 of 120."""
    return int(digits[:-1]), int(digits[-1])
