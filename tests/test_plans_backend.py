"""The chain over TensorRT plans, TensorRT itself rehearsed by ONNX Runtime over the same graphs."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from bad_input.command import spoil
from certificates import certificate_of, write_certified
from conftest import DEMO_MODEL, THREADS, TinyBundle
from eager import Forced, assert_decoded
from rehearsal import Rehearsal, add_stand_ins, rehearse
from test_parity import random_prompts
from tiny_models import ARCHITECTURES
from transformers import PreTrainedModel

from sedac_runtime import BundleError, EngineError, InputError, SedacModel, _core
from sedac_runtime._core import BenchCase, DecodingMode, DecodingSetting, PolicySettings
from sedac_runtime.library import find_onnxruntime

RTX = "tensorrt-rtx"
PROMPT = "class Stack:\n    def push(self, item):\n"
Rehearsed = tuple[SedacModel, Rehearsal]


@pytest.fixture(scope="session")
def rehearsed_tiny(
    tiny_bundle: Callable[[str], TinyBundle], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[PreTrainedModel, SedacModel]]:
    def get(name: str) -> tuple[PreTrainedModel, SedacModel]:
        reference, built = tiny_bundle(name)
        directory = Path(shutil.copytree(built, tmp_path_factory.mktemp(name) / "bundle"))
        add_stand_ins(directory, built.parent / "model", RTX, max_prefill_chunk=20)
        return reference, rehearse(directory, RTX, THREADS)[0]

    return get


@pytest.fixture(scope="session")
def stand_in_demo(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in fp16."""
    directory = tmp_path_factory.mktemp("stand_in") / "bundle"
    shutil.copytree(demo_bundle, directory)
    add_stand_ins(directory, DEMO_MODEL, RTX, max_prefill_chunk=32)
    return directory


@pytest.fixture(scope="session")
def rehearsed_demo(stand_in_demo: Path) -> Rehearsed:
    return rehearse(stand_in_demo, RTX, THREADS)


@pytest.mark.rotating
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_equals_transformers(
    name: str, rehearsed_tiny: Callable[[str], tuple[PreTrainedModel, SedacModel]]
) -> None:
    """At full depth, with propagated and deferred exits, and lossless. Prompts run in pieces."""
    reference, model = rehearsed_tiny(name)
    settings = {"max_new_tokens": 24}
    for prompt in random_prompts(256, 2):
        for mode in ("full", "lossless"):
            tokens = model.generate(prompt, mode=mode, **settings).tokens
            assert len(tokens) == 24
            assert_decoded(reference, prompt, tokens)
    exits = [1, 4, 3, 1, 1, 2]
    for kv_fill in ("propagate", "defer"):
        output = model.generate(prompt, forced_exit=exits, kv_fill=kv_fill, **settings)
        depths = assert_decoded(reference, prompt, output.tokens, Forced(exits), kv_fill)
        assert output.exit_layers == depths


def test_plans_and_caches_fit_into_the_memory_limit(stand_in_demo: Path) -> None:
    executor = Rehearsal(stand_in_demo, RTX)
    for limit, fits in ((1 << 20, False), (1 << 30, True)):
        with nullcontext() if fits else pytest.raises(BundleError, match="may take 1 MiB"):
            library = find_onnxruntime()
            _core.Model(stand_in_demo, library, THREADS, executor, memory_limit=limit)


def test_numbers_that_are_none_leave_nothing_behind(
    tiny_bundle: Callable[[str], TinyBundle], tmp_path: Path
) -> None:
    """Attention over masks multiplies what it masks out by zero."""
    _, built = tiny_bundle("llama")
    directory = Path(shutil.copytree(built, tmp_path / "bundle"))
    add_stand_ins(directory, built.parent / "model", RTX, max_prefill_chunk=20)
    sound = rehearse(directory, RTX, THREADS)[0].generate([1, 2], max_new_tokens=8)
    spoil(directory, "embed", float("nan"))  # of token 0
    model = rehearse(directory, RTX, THREADS)[0]
    with pytest.raises(EngineError, match="position 31 are not finite: the embed engine"):
        model.generate([0] * 32, max_new_tokens=8)
    assert model.generate([1, 2], max_new_tokens=8).tokens == sound.tokens


@pytest.mark.parametrize("kv_fill", ["propagate", "defer"])
def test_half_precision_exits_where_onnxruntime_does(
    kv_fill: str, rehearsed_demo: Rehearsed, demo_model: SedacModel
) -> None:
    """fp16 keys, values and residual stream against fp32 ones, on a text both are given."""
    text = demo_model.generate(PROMPT, mode="full", max_new_tokens=100).tokens
    assert len(text) == 100
    got = rehearsed_demo[0].follow(text, tau=0.98, kv_fill=kv_fill)
    wanted = demo_model.follow(text, tau=0.98, kv_fill=kv_fill)
    for ours, theirs in zip(got, wanted, strict=True):
        assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 0.97 * len(theirs)


@pytest.mark.parametrize("kv_fill", ["propagate", "defer"])
def test_only_tokens_are_embedded(kv_fill: str, rehearsed_demo: Rehearsed) -> None:
    """Positions that are filled or resumed later need contexts alone."""
    model, executor = rehearsed_demo
    executor.runs.clear()
    limits = {"max_new_tokens": 6, "stop_tokens": []}
    model.generate(PROMPT, forced_exit=[3, 12], kv_fill=kv_fill, **limits)
    assert executor.runs["portable_embed"] == 6
    assert executor.runs["portable_contexts"] > 6


def test_only_passes_that_verify_are_replayed(rehearsed_demo: Rehearsed) -> None:
    model, executor = rehearsed_demo
    model.generate([7] * 16, mode="full", max_new_tokens=8)
    before = dict(executor.calls)
    model.generate([7] * 16, mode="full", max_new_tokens=8)
    # on the host captured work calls again; whatever is longer is put on the stream anew
    assert executor.calls[False] == before[False]
    model.generate([7] * 33, mode="full", max_new_tokens=1)
    # embed, contexts and 12 layers over 32 tokens; the last token's pass is captured
    assert executor.calls[False] == before[False] + 14


def test_long_waits_are_caught_up_in_pieces(rehearsed_demo: Rehearsed) -> None:
    """More tokens wait at an exit than a pass may have."""
    model, _ = rehearsed_demo
    settings = {"forced_exit": [3] * 75 + [12] * 5, "max_new_tokens": 81, "stop_tokens": []}
    ours = model.generate(PROMPT, kv_fill="defer", **settings)
    assert ours.exit_layers[1:76] == [3] * 75
    text = [*model.encode(PROMPT), *ours.tokens]
    full = model.generate(text[:-5], mode="full", max_new_tokens=5, stop_tokens=[])
    assert full.tokens == ours.tokens[-5:]


def test_what_plans_lack_is_refused(stand_in_demo: Path, rehearsed_demo: Rehearsed) -> None:
    model, _ = rehearsed_demo
    with pytest.raises(InputError, match="bundle was trained for depths none"):
        probe = DecodingMode.exit(PolicySettings("probe", thresholds={3: 0.5}))
        model._core.follow([1, 2], DecodingSetting(probe))
    with pytest.raises(InputError, match="against monolith is out of range"):
        case = BenchCase("monolith", DecodingMode.full(), monolith=True)
        model.measure([case], [1], prompt_tokens=1, new_tokens=4, repeat=1, against=0)
    with pytest.raises(BundleError, match="holds no plans for tensorrt; add them with"):
        executor = Rehearsal(stand_in_demo, RTX)
        executor.target = "tensorrt"
        _core.Model(stand_in_demo, "", 1, executor)


def test_an_executor_that_fails_names_the_plan(stand_in_demo: Path) -> None:
    class Failing(Rehearsal):
        def __call__(self, *_: object) -> None:
            raise RuntimeError("out of memory")

    executor = Failing(stand_in_demo, RTX)
    with pytest.raises(EngineError, match=r"portable_contexts\.plan: out of memory"):
        _core.Model(stand_in_demo, find_onnxruntime(), 1, executor)


def test_certificates_are_not_of_plans(stand_in_demo: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(stand_in_demo, tmp_path / "bundle"))
    certificate = certificate_of(bundle)
    write_certified(bundle, certificate)
    model = SedacModel.from_pretrained(bundle, threads=THREADS)
    assert model.generate([1], mode="exit", max_new_tokens=1).certificate == certificate
    model, _ = rehearse(bundle, RTX, THREADS)
    output = model.generate([1], mode="exit", max_new_tokens=1)
    assert output.certificate is None
    assert "TensorRT plans" in (output.certification or "")
