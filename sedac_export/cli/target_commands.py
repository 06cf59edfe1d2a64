"""Building for the targets beside ONNX Runtime."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from sedac_export.bundle.cuda_entry import CudaChain
from sedac_export.bundle.manifest import Precision, QuantizedWeights, read_manifest
from sedac_export.bundle.plan_entries import BuildOptions
from sedac_export.cli import tensorrt_commands as tensorrt
from sedac_export.cli.progress import progress_bar
from sedac_export.cli.quiet import silence_libraries
from sedac_export.cli.targets import OTHERS, TargetName, Targets
from sedac_export.console import console
from sedac_export.errors import SedacError
from sedac_runtime.flavour import Target


@dataclass(frozen=True)
class ChosenTargets:
    """The targets to build for, which this host can do: TensorRT's flavours, and others or not."""

    flavours: list[Target]
    options: BuildOptions
    cuda: bool
    onnxruntime_cuda: bool

    @classmethod
    def check(
        cls,
        targets: list[TargetName],
        options: BuildOptions,
        precision: Precision,
        quantized: QuantizedWeights | None,
    ) -> "ChosenTargets":
        """Those among `targets`. Raises SedacError when one cannot be built here.

        Which layers are kept is not looked at, only whether anything is.
        """
        symmetric = quantized is None or quantized.symmetric
        chosen = cls(
            tensorrt.check_flavours(targets, options, precision, symmetric),
            options,
            cuda=TargetName.CUDA in targets,
            onnxruntime_cuda=TargetName.ONNXRUNTIME_CUDA in targets,
        )
        if chosen.onnxruntime_cuda:
            from sedac_export.device_graphs.onnxruntime_cuda import check_precision

            check_precision(precision)
        if chosen.cuda:
            from sedac_export.cuda.add_cuda import check_cuda

            check_cuda(precision, quantized)
        return chosen

    def add(self, directory: Path, model: str | None, just_built: bool = False) -> None:
        """Build for them into the bundle `directory`.

        just_built: it was built from `model` just now, which needs no check then.
        """
        if self.onnxruntime_cuda:
            _add_onnxruntime_cuda(directory, model, just_built)
        if self.cuda:
            _add_cuda(directory, model, just_built)
        tensorrt.add_flavours(directory, self.flavours, self.options, model, just_built)


def engines(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    target: Targets,
    model: Annotated[
        str | None,
        typer.Option(help="The original model, if the bundle has no engines of that kind yet."),
    ] = None,
    max_batch_size: tensorrt.MaxBatchSize = 1,
    max_prefill_chunk: tensorrt.MaxPrefillChunk = 512,
    compute_capabilities: tensorrt.ComputeCapabilities = "",
    version_compatible: tensorrt.VersionCompatible = False,
    hardware_compatible: tensorrt.HardwareCompatible = False,
) -> None:
    """Add engines for GPUs to a bundle. An interrupted build of TensorRT engines resumes."""
    if set(target) == {TargetName.ONNXRUNTIME}:
        raise SedacError(f"every bundle has its ONNX Runtime engines; name {OTHERS} as --target")
    options = tensorrt.build_options(
        max_batch_size,
        max_prefill_chunk,
        compute_capabilities,
        version_compatible,
        hardware_compatible,
    )
    manifest = read_manifest(bundle)
    chosen = ChosenTargets.check(target, options, manifest.precision, manifest.quantization)
    chosen.add(bundle, model)


def _add_onnxruntime_cuda(directory: Path, model: str | None, just_built: bool) -> None:
    from sedac_export.device_graphs.onnxruntime_cuda import add_onnxruntime_cuda

    silence_libraries()
    with progress_bar("trace") as progress:
        graphs = add_onnxruntime_cuda(directory, model, progress, just_built)
    summary = f"graphs for ONNX Runtime's CUDA provider: {len(graphs.layers)} layer engines"
    console.print(summary, highlight=False, soft_wrap=True)


def _add_cuda(directory: Path, model: str | None, just_built: bool) -> None:
    from sedac_export.cuda.add_cuda import add_cuda

    silence_libraries()
    with progress_bar("compile", "pack") as progress:
        chain = add_cuda(directory, model, progress, just_built)
    console.print(_summary(directory, chain), highlight=False, soft_wrap=True)


def _summary(directory: Path, chain: CudaChain) -> str:
    size = (directory / chain.weights).stat().st_size
    architectures = ", ".join(module.architecture for module in chain.modules)
    return (
        f"CUDA chain for {architectures}, compiled by NVRTC {chain.compiler}; weights"
        f" {size / 1e6:.1f} MB"
    )


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(engines)
