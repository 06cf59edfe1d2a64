"""The backends on a GPU: the chain as one kernel, the core's CUDA device, and TensorRT's plans."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import DEMO_MODEL, THREADS, require_chain
from rehearsal import add_stand_ins

from sedac_export.bundle.plan_entries import BuildOptions
from sedac_export.cuda.add_cuda import add_cuda
from sedac_export.cuda.validate_chain import validate
from sedac_export.tensorrt.add import add_target
from sedac_runtime import SedacModel, _core
from sedac_runtime.flavour import FLAVOURS, Target, find_gpu
from sedac_runtime.library import find_onnxruntime

PROMPT = "class Stack:\n    def push(self, item):\n"
PROMPTS = (PROMPT, "def main():\n", "import os\nimport sys\n\ndef walk(path):\n")
ATTEMPTS = 10
WAYS: list[dict[str, object]] = [
    {"mode": "full"},
    {"mode": "exit", "tau": 0.98},
    {"mode": "lossless", "drafter": "early-exit"},
    {"forced_exit": [3, 6, 12], "kv_fill": "defer"},
]


def assert_same_texts(model: SedacModel, reference: SedacModel) -> None:
    """fp16 on the GPU against ONNX Runtime on the CPU: nearly every token, and every exit."""
    for way in WAYS:
        settings = {"max_new_tokens": 100, "stop_tokens": []} | way
        ours, theirs = (each.generate(PROMPT, **settings) for each in (model, reference))
        same = sum(a == b for a, b in zip(ours.tokens, theirs.tokens, strict=True))
        assert same >= 95, way


@pytest.fixture
def own_demo(demo_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no NVIDIA GPU")
def test_captured_work_is_replayed(own_demo: Path, demo_model: SedacModel) -> None:
    """PyTorch computes the graphs on the core's stream, in TensorRT's place."""
    from torch_executor import TorchExecutor

    add_stand_ins(own_demo, DEMO_MODEL, "tensorrt-rtx", max_prefill_chunk=64)
    executor = TorchExecutor(own_demo, "tensorrt-rtx")
    model = SedacModel(own_demo, _core.Model(own_demo, find_onnxruntime(), THREADS, executor))
    assert_same_texts(model, demo_model)
    before = dict(executor.calls)
    model.generate(PROMPT, mode="full", max_new_tokens=100)
    assert executor.calls == before


@pytest.mark.gpu
@pytest.mark.parametrize("target", FLAVOURS)
def test_plans_run(target: Target, own_demo: Path, demo_model: SedacModel) -> None:
    pytest.importorskip(FLAVOURS[target].module)
    gpu = find_gpu()
    if gpu is None:
        pytest.skip("this host has no NVIDIA GPU")
    known = FLAVOURS[target].compute_capabilities
    if known and gpu.compute_capability not in known:
        pytest.skip(f"{FLAVOURS[target].title} does not run on {gpu.name}")
    add_target(own_demo, target, BuildOptions(max_prefill_chunk=64), str(DEMO_MODEL))
    model = SedacModel.from_pretrained(own_demo, threads=THREADS, backend=target)
    assert_same_texts(model, demo_model)


@pytest.fixture(scope="module")
def chain_bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo bundle with the target cuda."""
    require_chain()
    directory = tmp_path_factory.mktemp("chain") / "bundle"
    shutil.copytree(demo_bundle, directory)
    add_cuda(directory, str(DEMO_MODEL))
    return directory


@pytest.fixture(scope="module")
def chain_model(chain_bundle: Path) -> SedacModel:
    """That bundle on the GPU."""
    return SedacModel.from_pretrained(chain_bundle, threads=THREADS, backend="cuda")


@pytest.mark.gpu
def test_the_chain_generates_the_texts_of_onnxruntime(
    chain_model: SedacModel, demo_model: SedacModel
) -> None:
    assert chain_model.backend == "cuda"
    assert_same_texts(chain_model, demo_model)


@pytest.mark.gpu
def test_the_chain_is_validated(chain_bundle: Path) -> None:
    validation = validate(chain_bundle)
    assert [check.problems for check in validation.checks] == [[], [], []]
    assert validation.checks[2].checked


@pytest.mark.gpu
@pytest.mark.parametrize("drafter", ["auto", "early-exit"])
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}],
    ids=["greedy", "sampled", "filtered"],
)
def test_the_chain_is_lossless_bit_for_bit(
    sampling: dict[str, float], drafter: str, chain_model: SedacModel
) -> None:
    """A token's logits are the same bits in every pass, so there are not even ties to break."""
    drafted = 0
    # whether drafts pay is measured, and something else may use the GPU
    for _ in range(ATTEMPTS):
        for prompt in PROMPTS:
            wanted = {"max_new_tokens": 200, "stop_tokens": []} | sampling
            full = chain_model.generate(prompt, mode="full", **wanted)
            lossless = chain_model.generate(prompt, mode="lossless", drafter=drafter, **wanted)
            assert lossless.tokens == full.tokens
            drafted += lossless.drafted
        if drafted:
            break
    assert drafted > 0


@pytest.mark.gpu
@pytest.mark.parametrize("sequences", [6, 12])
def test_texts_together_are_those_of_each_alone(chain_model: SedacModel, sequences: int) -> None:
    """Bit for bit, in passes and batches, from copied beginnings and after giving caches up."""
    core = chain_model._core
    ways = [
        core.decoding("full"),
        core.decoding("lossless"),
        core.decoding("exit", forced_exit=[3, 12, 6], kv_fill="defer"),
        core.decoding("exit", forced_exit=[3, 12, 6], kv_fill="propagate"),
    ]
    code = core.encode("\n".join(PROMPTS))
    endings = [prompt + suffix for prompt in PROMPTS for suffix in ("", "\nclass ")]
    prompts = [[*code, *core.encode(ending)] for ending in endings]
    sampling = _core.Sampling(temperature=0.8, seed=3)
    cases = [(prompt, way) for way in ways for prompt in prompts]
    limits = {"max_new_tokens": 100, "stop_tokens": list[int]()}
    alone = [
        [token.id for token in core.generate(prompt, way, sampling, **limits)]  # type: ignore[arg-type]
        for prompt, way in cases
    ]
    budget = (sequences - 2) * (max(map(len, prompts)) + 50)
    settings = {"max_sequences": sequences, "cache_tokens": budget, "prefill_chunk": 20}
    scheduler = _core.Scheduler(core, **settings)
    first = scheduler.add(*cases[0], sampling, **limits)  # type: ignore[arg-type]
    together: dict[int, list[int]] = {first: []}
    numbers = [first]
    while True:
        for progress in scheduler.step():
            assert progress.error is None
            together[progress.sequence].extend(token.id for token in progress.tokens)
        if len(numbers) < len(cases):
            numbers.append(scheduler.add(*cases[len(numbers)], sampling, **limits))  # type: ignore[arg-type]
            together[numbers[-1]] = []
        statistics = scheduler.statistics()
        if statistics.running + statistics.waiting == 0:
            break
    assert [together[number] for number in numbers] == alone
    assert statistics.preemptions > 0 and statistics.prefix_hits > 0
