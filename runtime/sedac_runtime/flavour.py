"""The two flavours of TensorRT, this host's GPU, and whether a flavour's plans run on it."""

import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from sedac_runtime._core import PlanTensor

Target = Literal["tensorrt", "tensorrt-rtx"]
# whose memory plans run over: the first GPU's, or the host's
Device = Literal["cuda", "host"]


class Executor(Protocol):
    """Runs the plans of one target in the core's memory on a device.

    On the host there are no streams: a plan has run when the call returns.
    """

    @property
    def target(self) -> Target:
        """Whose plans it runs."""

    @property
    def device(self) -> Device:
        """Where the addresses of tensors are."""

    def __call__(
        self, plan: Path, tensors: list[PlanTensor], stream: int, replayed: bool, /
    ) -> None:
        """Put `plan` on `stream`; replayed says whether that is captured to be launched again."""


@dataclass(frozen=True)
class Flavour:
    """A target's display name, its Python module and the compute capabilities it builds for.

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


def incompatibility(target: Target, plans: Mapping[str, Any], version: str, gpu: Gpu) -> str | None:
    """Why this host cannot load `plans`, naming both sides and the remedy; None when it can.

    plans: a target's entry under "plans" in bundle.json. version: the flavour's that is installed.
    """
    title, options = FLAVOURS[target].title, plans["options"]
    remedy = f"build them again on this host with sedac-export engines --target {target}"
    if plans["platform"] != this_platform():
        return f"the plans are for {plans['platform']} and this host is {this_platform()}; {remedy}"
    newer_is_enough = options["version_compatible"] and _major(version) == _major(plans["version"])
    if version != plans["version"] and not newer_is_enough:
        return f"the plans are of {title} {plans['version']} and {version} is installed; {remedy}"
    above = options["hardware_compatible"] and float(gpu.compute_capability) >= 8.0
    if gpu.compute_capability not in plans["compute_capabilities"] and not above:
        known = ", ".join(plans["compute_capabilities"])
        return (
            f"the plans are for GPUs of compute capability {known} and {gpu.name} has"
            f" {gpu.compute_capability}; {remedy}"
        )
    return None


def _major(version: str) -> str:
    return version.partition(".")[0]
