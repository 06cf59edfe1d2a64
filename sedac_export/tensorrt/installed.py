"""What is installed of the two flavours of TensorRT, and whether plans run on this host."""

import importlib.metadata
import importlib.util
import re

from sedac_export.bundle.plan_entries import PlanSet
from sedac_export.errors import SedacError
from sedac_runtime.flavour import FLAVOURS, Flavour, Gpu, Target, incompatibility


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


def check_compatible(target: Target, plans: PlanSet, version: str, gpu: Gpu) -> None:
    """Raise SedacError naming both sides when this host cannot load `plans`.

    version is that of the flavour installed here.
    """
    reason = incompatibility(target, plans.model_dump(), version, gpu)
    if reason is not None:
        raise SedacError(reason)
