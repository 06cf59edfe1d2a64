"""NVRTC's part, on a stand-in for the chain."""

import sys
from pathlib import Path

import pytest

from sedac_export import SedacError
from sedac_export.bundle.cuda_entry import ChainOptions, ChainShape
from sedac_export.cuda import compiler
from sedac_export.cuda.compiler import ARCHITECTURES, NEWEST, Compiler, chain_macros, fingerprint
from sedac_export.cuda.weight_blocks import HalfBlocks

SHAPE = ChainShape(
    hidden=64,
    heads=4,
    key_value_heads=2,
    head_size=16,
    rotary_size=16,
    intermediate=96,
    layers=2,
    vocabulary=256,
)
OPTIONS = ChainOptions(
    activation="gelu_tanh",
    norm_epsilon=1e-6,
    attention_scale=0.25,
    attention_softcap=0.0,
    logits_softcap=30.0,
    embedding_scale=8.0,
)
MACROS = chain_macros(SHAPE, OPTIONS, tables=1, vectors=[], blocks=HalfBlocks())


def test_macros_are_the_shape_and_options() -> None:
    assert MACROS == {
        "SEDAC_HIDDEN": "64",
        "SEDAC_HEADS": "4",
        "SEDAC_KEY_VALUE_HEADS": "2",
        "SEDAC_HEAD_SIZE": "16",
        "SEDAC_ROTARY_SIZE": "16",
        "SEDAC_INTERMEDIATE": "96",
        "SEDAC_LAYERS": "2",
        "SEDAC_VOCABULARY": "256",
        "SEDAC_NORM_EPSILON": "1e-06f",
        "SEDAC_ATTENTION_SCALE": "0.25f",
        "SEDAC_ATTENTION_SOFTCAP": "0.0f",
        "SEDAC_LOGITS_SOFTCAP": "30.0f",
        "SEDAC_EMBEDDING_SCALE": "8.0f",
        "SEDAC_GELU": "1",
        "SEDAC_ROTARY_TABLES": "1",
        "SEDAC_QUERY_KEY_NORM": "0",
        "SEDAC_POST_NORMS": "0",
        "SEDAC_WEIGHT_BITS": "16",
        "SEDAC_ZERO_POINTS": "0",
    }


@pytest.mark.usefixtures("stand_in")
def test_every_architecture_has_machine_code_and_the_newest_ptx() -> None:
    steps: list[tuple[str, int, int]] = []
    compiled = Compiler().compile(MACROS, lambda *step: steps.append(step))
    assert [chain.architecture for chain in compiled] == [*ARCHITECTURES, NEWEST]
    *cubins, ptx = compiled
    for chain in cubins:
        assert chain.file == f"chain-{chain.architecture}.cubin"
        assert chain.code.startswith(b"\x7fELF")
        assert [kernel.rows for kernel in chain.kernels] == [1, 2, 4, 8]
        assert [kernel.shared_bytes for kernel in chain.kernels] == [100, 200, 400, 800]
        assert all(8 <= kernel.registers <= 64 for kernel in chain.kernels)
        assert all(kernel.spilled_bytes == 0 for kernel in chain.kernels)
    assert ptx.file == f"chain-{NEWEST}.ptx"
    assert b".target sm_120" in ptx.code
    assert b"\0" not in ptx.code
    assert ptx.kernels == []
    assert steps[-1] == ("compile", len(compiled), len(compiled))


@pytest.mark.usefixtures("stand_in")
def test_spills_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entries = [f'extern "C" __global__ void chain_{rows}() {{}}' for rows in (1, 2, 4)]
    spilling = """
        extern "C" __global__ void __launch_bounds__(1024, 2) chain_8(volatile float* out) {
          float kept[64];
          for (int i = 0; i < 64; i++) kept[i] = out[i];
          for (int i = 0; i < 64; i++) out[i] = kept[63 - i];
        }"""
    for header in ("facts.cuh", "structs.cuh"):
        (tmp_path / header).write_text((compiler.KERNELS / header).read_text())
    source = "\n".join(['#include "facts.cuh"', *entries, spilling])
    (tmp_path / "chain.cu").write_text(source)
    monkeypatch.setattr(compiler, "KERNELS", tmp_path)
    kernels = Compiler().compile(MACROS, lambda *_: None)[0].kernels
    assert [kernel.spilled_bytes > 0 for kernel in kernels] == [False, False, False, True]
    assert kernels[3].registers <= 32


@pytest.mark.usefixtures("stand_in")
def test_what_nvrtc_refuses_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "sedac_export")
    with pytest.raises(SedacError) as raised:
        Compiler().compile(MACROS | {"SEDAC_HIDDEN": "65"}, lambda *_: None)
    message = str(raised.value)
    assert f"does not compile the chain for {ARCHITECTURES[0]}" in message
    assert "chain.cu(5): error: static assertion failed" in message
    assert "\n" not in message
    assert "1 error detected" in caplog.text


def test_the_fingerprint_is_of_sources_and_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiler, "KERNELS", tmp_path)
    (tmp_path / "chain.cu").write_text("one")
    first = fingerprint(MACROS)
    assert fingerprint(MACROS) == first
    assert fingerprint(MACROS | {"SEDAC_LAYERS": "3"}) != first
    (tmp_path / "ring.cuh").write_text("two")
    assert fingerprint(MACROS) != first


def test_a_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(SedacError, match=r"pip install 'sedac\[cuda\]'"):
        Compiler()
