"""The chain's own sources: that NVRTC compiles them, and that a GPU computes the right numbers."""

import ctypes
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chain_cases import MODELS, TINY, TINY_GEMMA
from chain_decoder import ChainCase
from chain_weights import FORMATS, Quantized
from conftest import DEMO_MODEL

from sedac_export.bundle.cuda_entry import ChainOptions, ChainShape
from sedac_export.cuda import chain_abi
from sedac_export.cuda.compiler import ARCHITECTURES, Compiler
from sedac_export.cuda.description import HEAD_SIZES
from sedac_export.graph.quantized_graph import SCALES, ZERO_POINTS

CORE = Path(__file__).parents[3] / "sedac-core" / "src" / "backend" / "cuda"

# mirrors of the core's structs
MIRRORS = {
    "ChainFacts": chain_abi.Facts,
    "LayerPointers": chain_abi.Layer,
    "PassRow": chain_abi.Row,
    "SequenceRows": chain_abi.SequenceRows,
    "RowRace": chain_abi.RowRace,
    "RowRule": chain_abi.RowRule,
    "RowExit": chain_abi.RowExit,
    "PassParameters": chain_abi.Pass,
    "BatchLaunch": chain_abi.BatchLaunch,
    "BatchRow": chain_abi.BatchRow,
    "BatchParameters": chain_abi.BatchPass,
    "BatchOutcome": chain_abi.BatchOutcome,
    "SequenceOutcome": chain_abi.SequenceOutcome,
    "RowOutcome": chain_abi.RowOutcome,
    "RaceOutcome": chain_abi.RaceOutcome,
    "PassOutcome": chain_abi.Outcome,
    "DraftSequence": chain_abi.DraftSequence,
    "DraftParameters": chain_abi.DraftPass,
    "DraftOutcome": chain_abi.DraftOutcome,
    "Condition": chain_abi.Condition,
}


def demo_case() -> ChainCase:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    shape = ChainShape(
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        key_value_heads=config["num_key_value_heads"],
        head_size=config["head_dim"],
        rotary_size=config["head_dim"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        vocabulary=config["vocab_size"],
    )
    options = ChainOptions(
        activation="silu",
        norm_epsilon=config["rms_norm_eps"],
        attention_scale=config["head_dim"] ** -0.5,
        attention_softcap=0.0,
        logits_softcap=0.0,
        embedding_scale=1.0,
    )
    return ChainCase("demo", shape, options, ("attention_norm", "mlp_norm"))


@pytest.fixture
def compiler() -> Compiler:
    for module in ("cuda.bindings.nvrtc", "elftools"):
        pytest.importorskip(module, reason="of the extra sedac[cuda]")
    return Compiler()


@pytest.fixture
def compiler_of(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], Compiler]:
    """A compiler of a few lines that include kernels' headers, in place of the whole chain."""

    def of(lines: str) -> Compiler:
        source = tmp_path / "lines.cu"
        source.write_text(lines)
        monkeypatch.setattr("sedac_export.cuda.compiler.SOURCE", str(source))
        return compiler

    return of


# each takes 12 s
@pytest.mark.parametrize(
    ("case", "architecture"),
    [
        pytest.param(demo_case(), "sm_90", id="demo"),
        *(
            pytest.param(TINY_GEMMA, name, id=name, marks=pytest.mark.slow)
            for name in ARCHITECTURES
        ),
        *(
            pytest.param(replace(TINY, weights=weights), name, id=f"{name}-{weights}", marks=marks)
            for weights, name, marks in (
                ("int4", "sm_90", []),
                ("int8", "sm_90", pytest.mark.slow),
                ("int4-asymmetric", "sm_86", pytest.mark.slow),
            )
        ),
    ],
)
def test_the_chain_compiles(case: ChainCase, architecture: str, compiler: Compiler) -> None:
    compiled = compiler.compile_for(architecture, case.macros())
    assert compiled is not None
    assert [kernel.rows for kernel in compiled.kernels] == [1, 2, 4, 8]
    assert compiled.kernels[0].spilled_bytes == 0
    facts = chain_abi.Facts.from_buffer_copy(compiler.cubin(compiled.code).facts())
    assert facts.fit()
    assert facts.weight_block_bytes == case.format.blocks.block_bytes
    assert list(facts.shared_bytes) == [kernel.shared_bytes for kernel in compiled.kernels]
    # registers are allotted to whole blocks
    assert all(kernel.registers * facts.threads <= 65536 for kernel in compiled.kernels)
    assert 0 < facts.min_blocks <= facts.max_blocks
    assert facts.table_bytes > 0
    assert facts.scratch_bytes > 0
    assert facts.batch_scratch_bytes > 0
    for launch in facts.batch:
        assert 0 < launch.threads <= 1024
        assert launch.rows > 0


WIDE = ["Mistral-7B"]


@pytest.mark.parametrize(
    ("target", "left_out"),
    [
        ("compute_80", []),
        ("compute_89", WIDE),
        ("compute_90a", []),
        ("compute_120", WIDE),
    ],
)
def test_ordinary_shapes_fit_shared_memory(
    target: str, left_out: list[str], compiler_of: Callable[[str], Compiler]
) -> None:
    headers = ("shared", "batch_attention", "batch_products")
    compiler = compiler_of("\n".join(f'#include "{name}.cuh"' for name in headers))
    cases = [demo_case(), *MODELS]
    refused = [case for case in cases if compiler.compile_for(target, case.macros()) is None]
    assert [case.name for case in refused] == left_out


@pytest.mark.parametrize("target", ["compute_86", "compute_90a"])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_attention_takes_every_head_size(
    target: str, head_size: int, compiler_of: Callable[[str], Compiler]
) -> None:
    """Also where it takes fewer keys at a time."""
    lines = (
        '#include "attention.cuh"',
        '#include "batch_attention.cuh"',
        '#include "prefill_attention.cuh"',
        "template struct Attention<8>;",
    )
    compiler = compiler_of("\n".join(lines))
    sizes = {"head_size": head_size, "rotary_size": head_size}
    shape = demo_case().shape.model_copy(update=sizes)
    assert compiler.compile_for(target, replace(demo_case(), shape=shape).macros()) is not None


def core_launches(source: str, name: str) -> list[tuple[chain_abi.BatchKernel, int]]:
    """What the core's list of that name launches: kernels, and their stages."""
    numbers = {name: int(n) for name, n in re.findall(r"const (\w+): usize = (\d+);", source)}
    (items,) = re.findall(rf"{name}: \[[^=]* = \[(.*?)\];", source, re.DOTALL)
    launches = re.findall(r"\((\w+), (\d)\)", items)
    return [(chain_abi.BatchKernel(numbers[kernel]), int(stage)) for kernel, stage in launches]


def test_the_benchmark_and_the_core_have_the_same_structs() -> None:
    files = ("abi.rs", "batch_abi.rs", "draft_abi.rs")
    source = "".join((CORE / name).read_text() for name in files)
    sizes = dict(re.findall(r"assert!\(size_of::<(\w+)>\(\) == (\d+)\)", source))
    assert len(sizes) == 16
    for name, size in sizes.items():
        assert ctypes.sizeof(MIRRORS[name]) == int(size), name
    bodies = dict(re.findall(r"pub(?:\(super\))? struct (\w+) \{(.*?)\n\}", source, re.DOTALL))
    assert MIRRORS.keys() - bodies.keys() == {"Condition"}
    loaded_chain = pytest.importorskip("sedac_export.cuda.loaded_chain", reason="of sedac[cuda]")
    assert core_launches(source, "BATCH_LAYER") == list(loaded_chain._LAYER)
    for name in (
        *("BATCH_ROWS", "BATCH_LOGITS_ROWS", "BATCH_GROUP_ROWS", "SMALL_BATCH_ROWS"),
        "DRAFT_SEQUENCES",
    ):
        assert f"const {name}: usize = {getattr(chain_abi, name)};" in source
    entries = re.findall(r'"((?:batch|prefill)_\w+)"', source)
    assert entries == [kernel.entry for kernel in chain_abi.BatchKernel]
    for name, body in bodies.items():
        members = re.findall(r"^    pub(?:\(super\))? (\w+):", body, re.MULTILINE)
        assert members == [field[0] for field in MIRRORS[name]._fields_], name


@pytest.mark.parametrize("name", FORMATS)
def test_the_benchmark_packs_as_bundles_do(name: str) -> None:
    matrix = np.random.default_rng(0).standard_normal((40, 96)).astype(np.float16)
    chosen, tensor = FORMATS[name], torch.from_numpy(matrix)
    parts = {"": matrix}
    if isinstance(chosen, Quantized):
        numbers, scales, zeros = (part.numpy() for part in chosen.parts(tensor))
        values = numbers[:, ::2] | numbers[:, 1::2] << 4 if chosen.bits == 4 else numbers
        parts = {"": values, SCALES: scales.astype(np.float32)}
        if chosen.zero_points:
            padded = np.pad(zeros, ((0, 0), (0, 1)))
            parts[ZERO_POINTS] = padded[:, ::2] | padded[:, 1::2] << 4
    packed = chosen.blocks.pack(parts)
    assert np.array_equal(chosen.pack(tensor).numpy(), packed)
    assert np.array_equal(chosen.rounded(tensor).numpy(), chosen.blocks.unpack(packed, 40))
    assert np.abs(chosen.rounded(tensor).numpy() - matrix).max() < 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no NVIDIA GPU")
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("case", [TINY, TINY_GEMMA], ids=lambda case: case.name)
def test_passes_agree_with_pytorch_and_each_other(
    case: ChainCase, weights: str, compiler: Compiler
) -> None:
    from chain_batch_checks import BatchChecks
    from chain_batch_exit_checks import BatchExitChecks
    from chain_checks import ChainChecks
    from chain_drafter_checks import DrafterChecks
    from chain_launcher import ChainLauncher, card_architecture, compile_chain

    from sedac_export.cuda.loaded_chain import UnsupportedGpuError

    try:
        architecture = card_architecture()
    except UnsupportedGpuError as error:
        pytest.skip(str(error))
    case = replace(case, weights=weights)
    launcher = ChainLauncher(case, compile_chain(compiler, case, architecture))
    checks = [*ChainChecks(launcher).run(), *DrafterChecks(launcher).run()]
    checks += [*BatchChecks(launcher).run(), *BatchExitChecks(launcher).run()]
    assert [check for check in checks if not check.passed] == []
