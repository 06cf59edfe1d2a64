"""Options that commands have in common: how engines are loaded and run."""

import re
from enum import StrEnum
from functools import partial
from typing import Annotated

import typer

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

engine_option = partial(typer.Option, rich_help_panel="Engines and hardware")

ThreadsOption = Annotated[
    int | None, engine_option(help="Threads that run the engines. [default: all processors]")
]


class BackendName(StrEnum):
    """What --backend takes."""

    AUTO = "auto"
    ONNXRUNTIME = "onnxruntime"
    CUDA = "cuda"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


BackendOption = Annotated[
    BackendName,
    engine_option(
        "--backend",
        help="Runs the engines: ONNX Runtime on the CPU or a GPU, or on a GPU the CUDA kernels or"
        " TensorRT. auto takes the first that can run of CUDA kernels, TensorRT, ONNX Runtime on"
        " the GPU and on the CPU.",
    ),
]


class DeviceName(StrEnum):
    """What --device takes."""

    CPU = "cpu"
    CUDA = "cuda"


DeviceOption = Annotated[
    DeviceName | None,
    engine_option("--device", help="Where ONNX Runtime runs. [default: cpu]"),
]


class Verify(StrEnum):
    """What --verify takes."""

    ALWAYS = "always"
    CHANGED = "changed"


VerifyOption = Annotated[
    Verify,
    engine_option(help="Hash every file, or only files changed since the last check."),
]
MemoryOption = Annotated[
    str | None,
    engine_option(
        "--memory-limit",
        help="Limit for engines and KV cache, such as 6G. [default: available memory]",
    ),
]


def parse_bytes(text: str | None) -> int | None:
    """Bytes written as a number with K, M, G or T, of 1024 each, or without; None for None."""
    if text is None:
        return None
    size = re.fullmatch(r"(\d{1,15})([KMGT]?)", text, re.ASCII)
    if size is None:
        raise ValueError(f"--memory-limit {text} is not a size such as 800M or 6G")
    return int(size[1]) * UNITS[size[2]]
