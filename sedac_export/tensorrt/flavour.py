"""The two flavours of TensorRT, what is installed of them, and the GPU of this host."""

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass

from sedac_export.errors import SedacError
from sedac_export.tensorrt.entries import PlanSet, Target


@dataclass(frozen=True)
class Flavour:
    """A target's name for people, its Python module and the compute capabilities it builds for.

    An empty list means the capability of the GPU in the host that builds.
    """

    title: str
    module: str
    compute_capabilities: tuple[str, ...]


FLAVOURS: dict[Target, Flavour] = {
    "tensorrt": Flavour("TensorRT", "tensorrt", ()),
    "tensorrt-rtx": Flavour("TensorRT-RTX", "tensorrt_rtx", ("8.0", "8.6", "8.9", "12.0", "12.1")),
}


@dataclass(frozen=True)
class Gpu:
    """The first GPU of this host and its driver."""

    name: str
    compute_capability: str
    driver: str


def require(target: Target) -> Flavour:
    """The flavour of `target`. Raises SedacError with the install line when it is missing."""
    flavour = FLAVOURS[target]
    for module in (flavour.module, "polygraphy"):
        if importlib.util.find_spec(module) is None:
            raise SedacError(
                f"--target {target} needs the Python module {module}, which is not installed;"
                f" pip install 'sedac[{target}]'"
            )
    return flavour


def cuda_version(target: Target) -> str:
    """The major CUDA version that the installed flavour was made for, such as 13.

    Its driver is what the plans need.
    """
    pattern = re.compile(re.escape(FLAVOURS[target].module) + r"[-_]cu(\d+)$")
    for distribution in importlib.metadata.distributions():
        match = pattern.match(distribution.name.lower().replace("-", "_"))
        if match:
            return match[1]
    return ""


def this_platform() -> str:
    """Operating system and processor, such as linux-x86_64: plans run on those they name."""
    return f"{platform.system().lower()}-{platform.machine().lower()}"


def find_gpu() -> Gpu | None:
    """The host's first GPU as its driver names it, None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    run = subprocess.run(query, capture_output=True, text=True)
    line = run.stdout.partition("\n")[0]
    fields = [field.strip() for field in line.split(",")]
    return Gpu(*fields) if run.returncode == 0 and len(fields) == 3 else None


def check_compatible(target: Target, plans: PlanSet, version: str, gpu: Gpu) -> None:
    """Raise SedacError naming both sides when this host cannot load `plans`.

    version is that of the flavour installed here.
    """
    title, options = FLAVOURS[target].title, plans.options
    remedy = f"build them again on this host with sedac-export engines --target {target}"
    if plans.platform != this_platform():
        raise SedacError(
            f"the plans are for {plans.platform} and this host is {this_platform()}; {remedy}"
        )
    newer_is_enough = options.version_compatible and _major(version) == _major(plans.version)
    if version != plans.version and not newer_is_enough:
        raise SedacError(
            f"the plans are of {title} {plans.version} and {version} is installed; {remedy}"
        )
    above = options.hardware_compatible and float(gpu.compute_capability) >= 8.0
    if gpu.compute_capability not in plans.compute_capabilities and not above:
        known = ", ".join(plans.compute_capabilities)
        raise SedacError(
            f"the plans are for GPUs of compute capability {known} and {gpu.name} has"
            f" {gpu.compute_capability}; {remedy}"
        )


def _major(version: str) -> str:
    return version.partition(".")[0]
