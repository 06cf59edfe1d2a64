"""What puts plans on a stream, with a TensorRT that only records; the real one's names."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from bad_input.command import rewrite_manifest

import sedac_runtime.tensorrt as module
from sedac_runtime import EngineError, SedacModel
from sedac_runtime._core import SCHEMA_VERSION, PlanTensor
from sedac_runtime.flavour import Gpu, this_platform
from sedac_runtime.tensorrt import PlanExecutor

STREAM = 77
REFUSED = 13
PROFILES = [(1, 1), (1, 16), (1, 64)]


class Context:
    """Records what it is told."""

    def __init__(self, engine: "Engine") -> None:
        self.engine, self.shapes, self.addresses = engine, {}, {}
        self.profile: tuple[int, int] | None = None
        self.enqueued = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = (profile, stream)
        return True

    def set_input_shape(self, name: str, shape: list[int]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """As TensorRT infers it from the input's."""
        return (*self.shapes["x"][:2], self.engine.width)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address != REFUSED

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        self.enqueued += 1
        return not self.engine.broken


class Engine:
    """x [1, tokens, 8] -> y."""

    num_io_tensors, num_optimization_profiles, broken = 2, len(PROFILES), False
    width, itemsize, location, layout = 8, 2, "device", "linear"

    def __init__(self) -> None:
        self.contexts: list[Context] = []

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(itemsize=self.itemsize)

    def get_tensor_location(self, name: str) -> str:
        return self.location

    def get_tensor_format(self, name: str) -> str:
        return self.layout

    def create_execution_context(self) -> Context:
        self.contexts.append(Context(self))
        return self.contexts[-1]

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> str:
        return {"x": "in", "y": "out"}[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert name == "x"
        return [(1, tokens, 8) for tokens in (*PROFILES[profile][:1], 1, PROFILES[profile][1])]


class Recorded:
    """The module's place, and the engines that it made."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self.readable = True

    def deserialize(self, data: bytes) -> Engine | None:
        assert data == b"plan"
        if not self.readable:
            return None
        self.engines.append(Engine())
        return self.engines[-1]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    recorded = Recorded()
    fake: Any = ModuleType("tensorrt_rtx")
    fake.__spec__ = SimpleNamespace(name="tensorrt_rtx")
    fake.__version__ = "1.7"
    fake.Logger = SimpleNamespace(ERROR=1)
    fake.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    fake.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=recorded.deserialize)
    fake.TensorIOMode = SimpleNamespace(INPUT="in")
    fake.TensorLocation = SimpleNamespace(DEVICE="device")
    fake.TensorFormat = SimpleNamespace(LINEAR="linear")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    monkeypatch.setattr(module, "find_gpu", lambda: Gpu("RTX 4090", "8.9", "580.1"))
    yield recorded


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    plans = {
        "version": "1.7",
        "platform": this_platform(),
        "compute_capabilities": ["8.9"],
        "options": {"version_compatible": False, "hardware_compatible": False},
    }
    (tmp_path / "bundle.json").write_text("{}")
    rewrite_manifest(tmp_path, schema_version=SCHEMA_VERSION, plans={"tensorrt-rtx": plans})
    (tmp_path / "a.plan").write_bytes(b"plan")
    return tmp_path


def tensors(tokens: int, address: int = 100) -> list[PlanTensor]:
    """In fp16."""
    shape, size = [1, tokens, 8], tokens * 16
    return [
        PlanTensor("x", address, shape, size),
        PlanTensor("y", address + 1, shape, size),
        PlanTensor("index", 3, [1], 8),
    ]


def test_replayed_work_has_a_context_that_nothing_else_touches(
    recorded: Recorded, bundle: Path
) -> None:
    executor, plan = PlanExecutor("tensorrt-rtx", bundle), bundle / "a.plan"
    for _ in range(3):
        executor(plan, tensors(1), STREAM, True)
    executor(plan, tensors(4), STREAM, True)
    executor(plan, tensors(1, address=500), STREAM, True)
    (engine,) = recorded.engines
    one, four, elsewhere = engine.contexts
    assert [c.enqueued for c in engine.contexts] == [3, 1, 1]
    assert one.addresses == {"x": 100, "y": 101} and one.shapes == {"x": [1, 1, 8]}
    assert [one.profile, four.profile] == [(0, STREAM), (1, STREAM)]
    assert elsewhere.addresses == {"x": 500, "y": 501}


def test_other_work_shares_one_context_that_is_bound_anew(recorded: Recorded, bundle: Path) -> None:
    executor, plan = PlanExecutor("tensorrt-rtx", bundle), bundle / "a.plan"
    for tokens in (20, 64, 17):
        executor(plan, tensors(tokens), STREAM, False)
        (context,) = recorded.engines[0].contexts
        assert context.shapes == {"x": [1, tokens, 8]}
        assert context.profile == (2, STREAM)


def test_what_does_not_fit_is_said(recorded: Recorded, bundle: Path) -> None:
    executor, plan = PlanExecutor("tensorrt-rtx", bundle), bundle / "a.plan"
    with pytest.raises(RuntimeError, match="no profile for inputs of shapes"):
        executor(plan, tensors(65), STREAM, False)
    with pytest.raises(RuntimeError, match="a tensor y, which this runtime does not know"):
        executor(plan, tensors(1)[:1], STREAM, True)
    with pytest.raises(RuntimeError, match="does not take the memory of x"):
        executor(plan, tensors(3, address=REFUSED), STREAM, True)
    Engine.broken = True
    try:
        with pytest.raises(RuntimeError, match="did not put it on the stream"):
            executor(plan, tensors(2), STREAM, True)
    finally:
        Engine.broken = False


@pytest.mark.parametrize(
    ("property_", "value", "message"),
    [
        ("width", 9, r"x is \[1, 2, 9\] of 36 bytes, where the bundle's is \[1, 2, 8\] of 32"),
        ("itemsize", 4, r"x is \[1, 2, 8\] of 64 bytes, where .* of 32; build it again"),
        ("location", "host", "its x is no plain tensor on the GPU; build it again"),
        ("layout", "chw4", "its x is no plain tensor on the GPU; build it again"),
    ],
)
def test_a_plan_whose_tensors_are_not_the_bundles_is_not_run(
    recorded: Recorded,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    property_: str,
    value: object,
    message: str,
) -> None:
    """It would read and write beyond the memory that the core gives it."""
    monkeypatch.setattr(Engine, property_, value)
    executor = PlanExecutor("tensorrt-rtx", bundle)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            executor(bundle / "a.plan", tensors(2), STREAM, True)
    assert [context.enqueued for context in recorded.engines[0].contexts] == [0, 0]


def test_a_plan_that_cannot_be_loaded(recorded: Recorded, bundle: Path) -> None:
    recorded.readable = False
    with pytest.raises(RuntimeError, match="cannot load it; build it again"):
        PlanExecutor("tensorrt-rtx", bundle)(bundle / "a.plan", tensors(1), STREAM, True)


def test_plans_for_another_gpu_name_both_sides(
    recorded: Recorded, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_gpu", lambda: Gpu("H200", "9.0", "580.1"))
    executor = PlanExecutor("tensorrt-rtx", bundle)
    with pytest.raises(RuntimeError, match=r"capability 8\.9 and H200 has 9\.0; build them again"):
        executor(bundle / "a.plan", tensors(1), STREAM, True)
    assert recorded.engines == []


def test_without_a_gpu(
    recorded: Recorded, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_gpu", lambda: None)
    with pytest.raises(EngineError, match="needs an NVIDIA GPU, and none is found here; use"):
        SedacModel.from_pretrained(demo_bundle, backend="tensorrt-rtx")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, demo_bundle: Path) -> None:
    find = importlib.util.find_spec

    def missing(name: str) -> object:
        return None if name == "tensorrt" else find(name)

    monkeypatch.setattr(module.importlib.util, "find_spec", missing)
    with pytest.raises(EngineError, match=r"pip install 'sedac-runtime\[tensorrt\]'"):
        SedacModel.from_pretrained(demo_bundle, backend="tensorrt")


def test_the_installed_package_has_every_name_that_is_used() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    source = Path(module.__file__).read_text(encoding="utf-8")
    for owner, variable in ((trt.ICudaEngine, "engine"), (trt.IExecutionContext, "context")):
        used = set(re.findall(rf"\b{variable}\.(\w+)", source))
        assert len(used) >= 3
        assert used <= set(dir(owner))
    assert hasattr(trt.Runtime, "deserialize_cuda_engine")
    assert hasattr(trt.TensorIOMode, "INPUT") and hasattr(trt.Logger, "ERROR")
    assert hasattr(trt.TensorLocation, "DEVICE") and hasattr(trt.TensorFormat, "LINEAR")
    assert trt.DataType.BF16.itemsize == 2
