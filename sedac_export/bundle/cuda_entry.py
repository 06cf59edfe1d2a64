"""What the manifest says of the CUDA chain: a kernel for the model's shape, and its weights."""

from typing import Literal

from sedac_export.bundle.schema import StrictModel

Activation = Literal["silu", "gelu_tanh"]

# of bundles whose weights the kernel takes
PRECISIONS = ("fp16", "bf16", "int8", "int4")


class ChainShape(StrictModel, frozen=True):
    """The sizes that the kernel is compiled for; rotary_size is 0 where nothing is rotated."""

    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    rotary_size: int
    intermediate: int
    layers: int
    vocabulary: int


class ChainOptions(StrictModel):
    """The numbers that the kernel is compiled with. A soft cap of 0 is none."""

    activation: Activation
    norm_epsilon: float
    attention_scale: float
    attention_softcap: float
    logits_softcap: float
    embedding_scale: float


class ChainLayer(StrictModel):
    """One layer: the positions that a token sees, 0 for all, and the index of its rotary tables."""

    window: int
    rotary: int


class ChainKernel(StrictModel):
    """What an entry point for at most `rows` rows takes: registers and bytes, spills per thread.

    shared_bytes is dynamic shared memory per block.
    """

    rows: int
    registers: int
    shared_bytes: int
    spilled_bytes: int


class ChainModule(StrictModel):
    """A compiled file. architecture is sm_90 and the like for machine code, compute_120 for PTX.

    PTX is compiled by the driver, so that its kernels are not known here.
    """

    file: str
    architecture: str
    kernels: list[ChainKernel]


class CudaChain(StrictModel):
    """All that the runtime needs to run the whole chain as one kernel.

    compiler is NVRTC's version; fingerprint is of the kernel's sources and the compiler's options;
    block_bytes are those of 16 rows and 32 columns of a matrix in the weights' file.
    """

    compiler: str
    fingerprint: str
    shape: ChainShape
    options: ChainOptions
    layers: list[ChainLayer]
    modules: list[ChainModule]
    weights: str
    block_bytes: int = 1024
