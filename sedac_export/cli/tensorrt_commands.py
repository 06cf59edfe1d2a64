"""The part of the command sedac-export that builds for TensorRT."""

from pathlib import Path
from typing import Annotated

from sedac_export.bundle.manifest import Precision
from sedac_export.bundle.plan_entries import BuildOptions, PlanSet
from sedac_export.cli.progress import progress_bar
from sedac_export.cli.quiet import silence_libraries
from sedac_export.cli.targets import TargetName, target_option
from sedac_export.console import console
from sedac_export.errors import SedacError
from sedac_runtime.flavour import FLAVOURS, Target

MaxBatchSize = Annotated[int, target_option(help="TensorRT: maximum sequences per pass.")]
MaxPrefillChunk = Annotated[int, target_option(help="TensorRT: maximum prompt tokens per pass.")]
ComputeCapabilities = Annotated[
    str, target_option(help="TensorRT-RTX: GPUs to build for, such as 8.6,12.0. [default: all]")
]
VersionCompatible = Annotated[
    bool,
    target_option("--version-compatible", help="TensorRT: plans that later versions also load."),
]
HardwareCompatible = Annotated[
    bool, target_option("--hardware-compatible", help="TensorRT: plans for every GPU since Ampere.")
]


def build_options(
    max_batch_size: int,
    max_prefill_chunk: int,
    compute_capabilities: str,
    version_compatible: bool,
    hardware_compatible: bool,
) -> BuildOptions:
    """The options as the builder takes them."""
    return BuildOptions(
        max_batch_size=max_batch_size,
        max_prefill_chunk=max_prefill_chunk,
        compute_capabilities=[c.strip() for c in compute_capabilities.split(",") if c.strip()],
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )


def flags(options: BuildOptions) -> str:
    """Those of `options` that are not the defaults, as on the command line."""
    words = []
    for name, value in options.model_dump(exclude_defaults=True).items():
        words.append(f" --{name.replace('_', '-')}")
        if isinstance(value, list):
            words.append(f" {','.join(value)}")
        elif value is not True:
            words.append(f" {value}")
    return "".join(words)


def check_flavours(
    targets: list[TargetName], options: BuildOptions, precision: Precision, symmetric: bool
) -> list[Target]:
    """The TensorRT flavours among `targets`. Raises SedacError when one cannot be built here, or
    there are options for none."""
    from sedac_export.tensorrt.build_plans import check_options, check_quantization

    chosen = [flavour for flavour in FLAVOURS if TargetName(flavour) in targets]
    given = flags(options)
    if given and not chosen:
        raise SedacError(
            f"{given.split()[0]} is for --target {' and '.join(FLAVOURS)}; leave it out or add one"
            " of these"
        )
    for flavour in chosen:
        check_quantization(flavour, precision, symmetric)
        check_options(flavour, options)
    return chosen


def add_flavours(
    directory: Path,
    targets: list[Target],
    options: BuildOptions,
    model: str | None,
    just_built: bool,
) -> None:
    """Build the plans of `targets` into a bundle, its portable graphs first if it has none."""
    from sedac_export.tensorrt.add import add_target

    silence_libraries()
    for target in targets:
        with progress_bar("trace", target) as progress:
            plans = add_target(directory, target, options, model, progress, just_built)
        console.print(_summary(directory, target, plans), highlight=False, soft_wrap=True)


def _summary(directory: Path, target: Target, plans: PlanSet) -> str:
    seconds = [plan.seconds for plan in plans.plans]
    sizes = [(directory / plan.file).stat().st_size for plan in plans.plans]
    capabilities = ", ".join(plans.compute_capabilities)
    layers = [plan for plan in plans.plans if Path(plan.file).stem.startswith(("layer_", "block_"))]
    per_layer = sum(plan.seconds for plan in layers) / len(layers)
    return (
        f"{FLAVOURS[target].title} {plans.version}: {len(seconds)} plans,"
        f" {sum(sizes) / 1e6:.1f} MB, built in {sum(seconds):.1f} s, {per_layer:.2f} s per layer"
        f" engine; for compute capability {capabilities}"
    )
