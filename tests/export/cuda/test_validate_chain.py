"""What `sedac-export validate --target cuda` catches: defects as if they had been built so."""

import ctypes
import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from sedac_export import SedacError
from sedac_export.arrays import Array
from sedac_export.bundle import Bundle
from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.cuda_entry import ChainModule, CudaChain
from sedac_export.bundle.target_check import FAILED
from sedac_export.cli import app
from sedac_export.cuda import chain_agreement, validate_chain
from sedac_export.cuda.add_cuda import add_cuda
from sedac_export.cuda.chain_abi import BatchPass, Facts, Outcome, Pass
from sedac_export.cuda.compiler import ARCHITECTURES
from sedac_export.cuda.recomputed_chain import RecomputedChain
from sedac_export.cuda.validate_chain import choose_module, validate
from sedac_runtime.flavour import Gpu, find_gpu

from .conftest import HalfBundle

WEIGHTS = "engines/cuda/weights.safetensors"
SM_90, SM_100 = "engines/cuda/chain-sm_90.cubin", "engines/cuda/chain-sm_100.cubin"
PTX = "engines/cuda/chain-compute_120.ptx"

Chained = Callable[[str], Path]

pytestmark = pytest.mark.usefixtures("stand_in")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles with the target cuda, by architecture, made when they are first asked for."""
    return {"": tmp_path_factory.mktemp("chained")}


@pytest.fixture
def chained(half_bundle: HalfBundle, built: dict[str, Path], tmp_path: Path) -> Chained:
    """A bundle with the target cuda, which the test may change."""

    def get(name: str) -> Path:
        if name not in built:
            model, directory = half_bundle(name)
            add_cuda(directory, str(model))
            built[name] = Path(shutil.copytree(directory, built[""] / name))
        return Path(shutil.copytree(built[name], tmp_path / "chained"))

    return get


def chain_of(directory: Path) -> CudaChain:
    chain = bundle.read_manifest(directory).cuda
    assert chain is not None
    return chain


def enter(directory: Path, *files: str, chain: CudaChain | None = None) -> None:
    """Make what was changed what the manifest says."""
    manifest = bundle.read_manifest(directory)
    entries = {name: bundle.file_entry(directory, name) for name in files}
    changed = {"files": manifest.files | entries, "cuda": chain or manifest.cuda}
    bundle.write_manifest(directory, manifest.model_copy(update=changed))


def change_weights(directory: Path, change: Callable[[dict[str, Array]], None]) -> None:
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS)
    enter(directory, WEIGHTS)


def assert_fails(directory: Path, check: str, *messages: str) -> None:
    validation = validate(directory)
    problems = {one.name: one.problems for one in validation.checks}
    assert validation.exit_code() == FAILED[check]
    for message in messages:
        assert any(message in problem for problem in problems[check]), problems


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_a_sound_chain_passes(name: str, chained: Chained) -> None:
    validation = validate(chained(name))
    structure, agreement, execution = validation.checks
    assert validation.exit_code() == 0
    assert len(structure.engines) == len(ARCHITECTURES) + 2
    names = [row["engine"] for row in agreement.engines]
    assert names[0] == "layer_000"
    assert any(name.startswith("exit before layer_") for name in names)
    assert any(name.startswith("after exits before layer_") for name in names)
    assert names[-1] == "end to end"
    assert agreement.engines[-1]["argmax_agreement"] == 1
    if find_gpu() is None:
        assert not execution.checked
        assert "no NVIDIA GPU with its driver is found on this host" in execution.reason


def test_engines_of_several_layers_are_compared(half_bundle: HalfBundle) -> None:
    """Exits fill each of their layers from the hidden state that they had before all of them."""
    model, directory = half_bundle("qwen2", layers_per_engine=2)
    add_cuda(directory, str(model))
    validation = validate(directory)
    assert validation.exit_code() == 0
    names = [row["engine"] for row in validation.checks[1].engines]
    assert "after exits before block_002_003" in names


def test_other_weights_are_caught(chained: Chained) -> None:
    def change(weights: dict[str, Array]) -> None:
        weights["layers.2.down"][1, 1, 1, 1, 1] += 1
        weights["layers.1.mlp_norm"] *= 1.5
        weights["layers.1.qkv_bias"][3] += 1
        weights["head"][0, 0, 0, 0] += 1
        weights["rotary.0.cos"][7:] = weights["rotary.0.cos"][:-7].copy()
        weights["embed"] = weights["head"]
        weights["final_norm"] += 0.5

    directory = chained("qwen2")
    change_weights(directory, change)
    messages = [
        "layers.2 has 1 rows that are not the bundle's",
        "layers.1.mlp_norm is not the bundle's",
        "layers.1.qkv_bias is not the bundle's",
        "head is not the bundle's",
        "rotary.0.cos is none of the bundle's tables",
        "embed is there though it is the head's",
        "final_norm is not the bundle's",
    ]
    assert_fails(directory, "structure", *(f"weights: {message}" for message in messages))


def test_weights_in_other_places_are_caught(chained: Chained) -> None:
    """Every row is the bundle's, but gate is where up should be."""

    def exchange(weights: dict[str, Array]) -> None:
        packed = weights["layers.1.gate_up"]
        packed[:] = packed[:, :, ::-1].copy()

    directory = chained("qwen2")
    change_weights(directory, exchange)
    assert_fails(directory, "onnxruntime", "layer_001: cosine")


def test_what_the_kernel_is_compiled_for_is_held_to_the_model(chained: Chained) -> None:
    directory = chained("qwen2")
    chain = chain_of(directory)
    options = chain.options.model_copy(update={"attention_scale": 1.0})
    enter(directory, chain=chain.model_copy(update={"options": options}))
    assert_fails(directory, "onnxruntime", "layer_000: cosine", "end to end: cosine")


def test_other_machine_code_is_caught(chained: Chained) -> None:
    directory = chained("llama")
    chain = chain_of(directory)
    (directory / SM_90).write_bytes((directory / SM_100).read_bytes())
    (directory / PTX).write_text(".target sm_90\n.visible .entry chain_1(\n")
    blackwell = next(module for module in chain.modules if module.file == SM_100)
    blackwell.kernels[1].registers += 8
    enter(directory, SM_90, PTX, chain=chain)
    assert_fails(
        directory,
        "structure",
        "chain-sm_90: it is for sm_100 instead of sm_90",
        "chain-compute_120: it is not for sm_120",
        "chain-compute_120: it has no entry prepare",
        "chain-sm_100: chain_2 takes ",
    )
    (directory / SM_90).write_bytes(b"no machine code")
    enter(directory, SM_90)
    assert_fails(directory, "structure", "chain-sm_90: it is no machine code")


class HostMemory:
    """In the GPU's place: memory of the host."""

    def __init__(self) -> None:
        self.held: list[Any] = []

    def __enter__(self) -> "HostMemory":
        return self

    def __exit__(self, *_: object) -> None: ...

    def zeros(self, size: int) -> int:
        self.held.append(ctypes.create_string_buffer(size))
        return ctypes.addressof(self.held[-1])

    def upload(self, array: Array) -> int:
        address = self.zeros(array.nbytes)
        self.write(address, array)
        return address

    def write(self, address: int, array: Array) -> None:
        ctypes.memmove(address, array.tobytes(), array.nbytes)

    def read(self, address: int, array: Array) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def shared(self, kind: type[ctypes.Structure]) -> Any:
        self.held.append(kind())
        return self.held[-1]

    def synchronize(self) -> None: ...


class ComputedChain:
    """In the kernels' place: what a pass's parameter asks for, computed by PyTorch.

    `noise` is what makes a token's bits depend on its pass, and `batch_noise` on whether it is in a
    batch; prefill runs other tokens by `shift`, or none where that is None; where it does not fill
    them, the caches of layers that exits skip hold other numbers.
    """

    def __init__(
        self,
        directory: Path,
        noise: float = 0.0,
        shift: int | None = 0,
        batch_noise: float = 0.0,
        fills: bool = True,
    ) -> None:
        self.chain, self.noise, self.shift = chain_of(directory), noise, shift
        self.batch_noise, self.fills = batch_noise, fills
        opened = Bundle.open(directory)
        weights = opened.path(self.chain.weights)
        self.weights = RecomputedChain(opened.manifest, self.chain, weights)
        hidden = self.chain.shape.hidden
        self.facts = Facts(scratch_bytes=64, saved_floats=hidden + 4, batch_scratch_bytes=1)
        self.blocks, self.prepared = 1, 0
        # of each position its token, and the depth of its exit
        self.tokens: dict[int, tuple[int, int]] = {}
        self.logits: dict[tuple[int, ...], Array] = {}
        self.before: dict[int, dict[int, torch.Tensor]] = defaultdict(dict)
        self.scratch, self.rows = 0, 8

    def prepare(self, tables: int) -> None:
        self.prepared = tables

    def launch(self, parameters: Pass) -> None:
        assert parameters.tables == self.prepared != 0
        assert parameters.clear_rows == self.rows
        assert parameters.scratch != self.scratch
        self.rows, self.scratch = parameters.rows, parameters.scratch
        (sequence,) = parameters.sequence[: parameters.sequences]
        rows = parameters.row[: parameters.rows]
        hidden = torch.stack([self.start(parameters, row) for row in rows])
        for layer in range(rows[0].first_layer, sequence.max_depth):
            before = hidden
            self.before[layer] |= {row.position: h for row, h in zip(rows, hidden, strict=True)}
            seen = [self.before[layer][position] for position in range(rows[-1].position + 1)]
            hidden = self.weights._run_layer(layer, torch.stack(seen))[-len(rows) :]
        cosine = torch.nn.functional.cosine_similarity(before[-1], hidden[-1], dim=0)
        outcome = Outcome.from_address(parameters.outcome)
        outcome.sequence[0].stability = float((cosine + 1) / 2)
        if sequence.fills:
            filled = hidden if self.fills else torch.zeros_like(hidden)
            for layer in range(sequence.max_depth, self.chain.shape.layers):
                self.before[layer] |= {r.position: h for r, h in zip(rows, filled, strict=True)}
        self.tokens |= {row.position: (row.token, sequence.max_depth) for row in rows}
        if sequence.max_depth < self.chain.shape.layers:
            for row, values in zip(rows, hidden.numpy(), strict=True):
                self.saved(parameters, row)[:] = values
        if parameters.logits_rows:
            known = map(self.known, rows, self.weights._head(hidden))
            logits = np.stack(list(known)) + np.float32(self.noise * len(rows))
            ctypes.memmove(parameters.logits, logits.tobytes(), logits.nbytes)

    def run_batch(self, parameters: BatchPass, layers: int) -> None:
        prefills = not parameters.logits_rows
        if prefills and self.shift is None:
            return
        rows = parameters.row[: parameters.rows]
        tokens = [row.token + (self.shift or 0) * prefills for row in rows]
        positions = range(rows[0].position, rows[-1].position + 1)
        hidden = self.weights._embed(np.array(tokens))
        for layer in range(layers):
            self.before[layer] |= dict(zip(positions, hidden, strict=True))
            seen = [self.before[layer][position] for position in range(positions.stop)]
            hidden = self.weights._run_layer(layer, torch.stack(seen))[-len(tokens) :]
        self.tokens |= {at: (token, layers) for at, token in zip(positions, tokens, strict=True)}
        wanted = parameters.logits_row[: parameters.logits_rows]
        if wanted:
            known = map(self.known, [rows[row] for row in wanted], self.weights._head(hidden))
            logits = np.stack(list(known)) + np.float32(self.batch_noise)
            ctypes.memmove(parameters.logits, logits.tobytes(), logits.nbytes)

    def known(self, row: Any, logits: Array) -> Array:
        """The first logits after a text: PyTorch's bits depend on the number of rows."""
        text = tuple(self.tokens[position] for position in range(row.position + 1))
        return self.logits.setdefault(text, logits)

    def start(self, parameters: Pass, row: Any) -> torch.Tensor:
        if row.token >= 0:
            return self.weights._embed(np.array([row.token]))[0]
        return torch.from_numpy(self.saved(parameters, row).copy())

    def saved(self, parameters: Pass, row: Any) -> Array:
        size = self.chain.shape.hidden
        address = parameters.saved + 4 * self.facts.saved_floats * row.position
        return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address))


def stand(
    directory: Path, monkeypatch: pytest.MonkeyPatch, computed: ComputedChain | None = None
) -> None:
    chain = computed or ComputedChain(directory)
    # it runs every layer over the whole text
    monkeypatch.setattr(chain_agreement, "TOKENS", 20)
    monkeypatch.setattr(validate_chain, "BIT_TOKENS", 12)
    monkeypatch.setattr(validate_chain, "find_gpu", lambda: Gpu("H200", "9.0", "580.1"))
    monkeypatch.setattr("sedac_export.cuda.gpu_memory.GpuMemory", HostMemory)
    monkeypatch.setattr("sedac_export.cuda.gpu_chain.LoadedChain", lambda code: chain)


def test_execution_is_held_to_the_gates(chained: Chained, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the driver and the kernel: passes are made, states carried, gates asked."""
    directory = chained("gemma3")
    stand(directory, monkeypatch)
    validation = validate(directory)
    assert validation.exit_code() == 0
    execution = validation.checks[2]
    assert execution.checked
    assert [row["engine"] for row in execution.engines][-1] == "end to end"
    other = ComputedChain(directory)
    other.chain.layers.reverse()
    stand(directory, monkeypatch, other)
    assert_fails(directory, "execution", "layer_000: cosine")


def test_caches_that_exits_leave_unfilled_are_caught(
    chained: Chained, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = chained("qwen2")
    stand(directory, monkeypatch, ComputedChain(directory, fills=False))
    assert_fails(directory, "execution", "after exits before layer_")


def test_bits_that_depend_on_the_pass_are_caught(
    chained: Chained, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = chained("qwen2")
    stand(directory, monkeypatch, ComputedChain(directory, noise=1e-5))
    assert_fails(directory, "execution", "logits are other bits in passes of other sizes")


@pytest.mark.parametrize("shift", [1, None])
def test_a_prefill_of_other_bits_is_caught(
    shift: int | None, chained: Chained, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = chained("qwen2")
    stand(directory, monkeypatch, ComputedChain(directory, shift=shift))
    assert_fails(directory, "execution", "other bits where the tokens before it are prefilled")


def test_a_batch_of_other_bits_is_caught(chained: Chained, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = chained("qwen2")
    stand(directory, monkeypatch, ComputedChain(directory, batch_noise=1e-5))
    assert_fails(directory, "execution", "other bits in a batch than in a pass")


def test_a_driver_that_fails_fails_the_check(
    chained: Chained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(code: bytes) -> None:
        raise SedacError("the CUDA driver failed: CUDA_ERROR_INVALID_IMAGE")

    directory = chained("llama")
    stand(directory, monkeypatch)
    monkeypatch.setattr("sedac_export.cuda.gpu_chain.LoadedChain", failing)
    assert_fails(directory, "execution", "the chain does not run: the CUDA driver failed")


@pytest.mark.skipif(find_gpu() is not None, reason="this host has an NVIDIA GPU")
def test_a_host_without_the_driver_is_told_so() -> None:
    from sedac_export.cuda.gpu_memory import GpuMemory

    with pytest.raises(SedacError, match="the NVIDIA driver's libcuda is not found"):
        GpuMemory().__enter__()


def test_a_gpu_that_the_chain_is_not_for_is_said(
    chained: Chained, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = chained("llama")
    monkeypatch.setattr(validate_chain, "find_gpu", lambda: Gpu("T4", "7.5", "580.1"))
    execution = validate(directory).checks[2]
    assert not execution.checked
    assert execution.reason.startswith("no supported GPU: the chain is for sm_")
    assert "T4 has 7.5" in execution.reason


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ("8.6", "sm_86"),
        ("8.7", "sm_86"),
        ("9.0", "sm_90"),
        ("7.5", None),
        ("12.1", "sm_120"),
        ("13.0", "compute_120"),
    ],
)
def test_the_module_is_the_one_that_the_runtime_chooses(
    capability: str, architecture: str | None
) -> None:
    names = ("compute_120", "sm_80", "sm_86", "sm_90", "sm_120")
    modules = [ChainModule(file="x", architecture=name, kernels=[]) for name in names]
    chosen = choose_module(modules, capability)
    assert (chosen and chosen.architecture) == architecture


def test_the_command_validates_what_the_bundle_has(chained: Chained) -> None:
    directory = chained("llama")
    run = CliRunner().invoke(app, ["validate", str(directory), "--json"])
    assert run.exit_code == 0
    report = json.loads(run.stdout)
    assert report["passed"]
    assert list(report["targets"]) == ["cuda"]
    checks = report["targets"]["cuda"]["checks"]
    assert [checks[name]["passed"] for name in ("structure", "onnxruntime")] == [True, True]


def test_a_bundle_without_a_chain_says_how_to_add_it(half_bundle: HalfBundle) -> None:
    _, directory = half_bundle("llama")
    with pytest.raises(SedacError, match="holds no cuda engines; add it with sedac-export engines"):
        validate(directory)
    manifest = Bundle.open(directory).manifest
    refused = manifest.model_copy(update={"cuda_refusal": "its norms are odd"})
    bundle.write_manifest(directory, refused)
    with pytest.raises(SedacError, match="holds no cuda engines: its norms are odd"):
        validate(directory)
