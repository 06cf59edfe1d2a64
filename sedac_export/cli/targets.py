"""What --target takes."""

from enum import StrEnum
from functools import partial
from typing import Annotated

import typer


class TargetName(StrEnum):
    """A target that engines are built for."""

    ONNXRUNTIME = "onnxruntime"
    ONNXRUNTIME_CUDA = "onnxruntime-cuda"
    CUDA = "cuda"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


OTHERS = " or ".join(name for name in TargetName if name is not TargetName.ONNXRUNTIME)

target_option = partial(typer.Option, rich_help_panel="Targets")

Targets = Annotated[
    list[TargetName],
    target_option(
        "--target", help="Target to build for; repeatable. ONNX Runtime's for CPUs is always built."
    ),
]
