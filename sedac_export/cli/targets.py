"""What --target takes."""

from enum import StrEnum
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

Targets = Annotated[
    list[TargetName],
    typer.Option(
        "--target", help="Target to build for; repeatable. ONNX Runtime's for CPUs is always built."
    ),
]
