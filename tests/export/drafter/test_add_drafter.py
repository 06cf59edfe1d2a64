"""A drafter in a bundle: trained by the command, bound to its model, and changing no token."""

import json
import shutil
from pathlib import Path

import pytest
from build_cache import BuildCache
from certificates import certificate_of, write_certified
from conftest import require_chain
from typer.testing import CliRunner

from sedac_export import BuildRequest
from sedac_export.build.inspection import inspect_bundle
from sedac_export.bundle import Bundle
from sedac_export.bundle.certified import read_certification
from sedac_export.cli.commands import app
from sedac_export.cuda.add_cuda import add_cuda
from sedac_export.drafter.add_drafter import add_drafter
from sedac_export.drafter.drafter_file import DRAFTER, DrafterFile
from sedac_export.drafter.train_drafter import DrafterRequest, load_model, train_drafter
from sedac_export.errors import SedacError
from sedac_export.model.tokenizer import load_tokenizer
from sedac_runtime import SedacModel
from sedac_runtime._core import Sampling, Scheduler

MODEL = Path(__file__).parents[3] / "demo" / "model"
PROMPT = "class Stack:\n    def push(self, item):\n"


@pytest.fixture(scope="session")
def drafter(build_cache: BuildCache) -> Path:
    """The directory of a drafter for the demo model, trained for a few steps."""

    def make(folder: Path) -> None:
        texts = (Path(json.__file__).read_text(),)
        request = DrafterRequest(folder, "demo", texts=texts, steps=40, max_tokens=48)
        tokenizer = load_tokenizer(MODEL)
        assert tokenizer is not None
        train_drafter(load_model(MODEL, "cpu"), tokenizer, request, lambda *_: None)

    return build_cache.made("drafter", make)


@pytest.fixture(scope="session")
def drafting_bundle(
    drafter: Path, demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The demo bundle with the drafter."""
    directory = tmp_path_factory.mktemp("drafting") / "bundle"
    shutil.copytree(demo_bundle, directory)
    add_drafter(directory, drafter / DRAFTER)
    return directory


def test_the_file_names_its_model(drafter: Path) -> None:
    assert DrafterFile.load(drafter / DRAFTER).metadata == {"model": "demo"}


def test_whoever_reads_the_bundle_reads_its_drafter(drafting_bundle: Path) -> None:
    modes = {(drafting_bundle / name).stat().st_mode for name in ("bundle.json", DRAFTER)}
    assert len(modes) == 1


@pytest.mark.parametrize("drafter_name", ["trained", "auto"])
def test_tokens_are_full_depths(drafting_bundle: Path, drafter_name: str) -> None:
    model = SedacModel.from_pretrained(drafting_bundle)
    drafted = 0
    for temperature in (0.0, 0.7):
        for seed in range(2):
            settings = {"max_new_tokens": 40, "temperature": temperature, "seed": seed}
            full = model.generate(PROMPT, mode="full", **settings)  # type: ignore[arg-type]
            drafting = model.generate(
                PROMPT,
                mode="lossless",
                drafter=drafter_name,
                **settings,  # type: ignore[arg-type]
            )
            assert drafting.tokens == full.tokens
            drafted += drafting.drafted
    assert drafted > 0


@pytest.mark.gpu
def test_the_kernel_drafts_and_changes_no_token(
    drafting_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it drafts is compared with PyTorch in tests/export/cuda/test_kernels.py."""
    require_chain()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = shutil.copytree(drafting_bundle, tmp_path / "bundle")
    add_cuda(bundle, str(MODEL))
    model = SedacModel.from_pretrained(bundle, backend="cuda")
    drafted = 0
    for start in range(0, 2400, 300):
        prompt = Path(json.__file__).read_text()[start : start + 300]
        for temperature in (0.0, 0.7):
            settings = {"max_new_tokens": 64, "temperature": temperature, "stop_tokens": []}
            full = model.generate(prompt, mode="full", **settings)
            output = model.generate(prompt, drafter="trained", **settings)
            assert output.tokens == full.tokens
            drafted += output.drafted
    assert drafted > 0


def test_texts_are_drafted_for_together(
    drafting_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what other tests' texts taught about the drafter may be that it does not pay
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = SedacModel.from_pretrained(drafting_bundle)
    core, sampling = model._core, Sampling(temperature=0.7, seed=3)
    # two begin alike: what one took in is copied
    prompts = [model.encode(text) for text in (PROMPT, PROMPT + "        self.", "import os\n")]
    settings = {"max_new_tokens": 24, "stop_tokens": []}
    alone = [
        [token.id for token in core.generate(prompt, core.decoding("full"), sampling, **settings)]  # type: ignore[arg-type]
        for prompt in prompts
    ]
    decoding = core.decoding("lossless", drafter="trained")
    scheduler = Scheduler(core, max_sequences=2, prefill_chunk=256)
    numbers = [scheduler.add(prompt, decoding, sampling, **settings) for prompt in prompts]  # type: ignore[arg-type]
    together: dict[int, list[int]] = {number: [] for number in numbers}
    drafted = 0
    while scheduler.statistics().running + scheduler.statistics().waiting:
        for progress in scheduler.step():
            together[progress.sequence] += [token.id for token in progress.tokens]
            drafted += progress.drafts.drafted if progress.drafts else 0
    assert list(together.values()) == alone
    assert drafted > 0


def test_inspect_shows_it(drafting_bundle: Path) -> None:
    shown = inspect_bundle(drafting_bundle)["drafter"]
    assert shown["feature_layers"] == [2, 6, 12] and shown["tokens"] > 0
    result = CliRunner().invoke(app, ["inspect", str(drafting_bundle)])
    assert f"trained drafter of {shown['tokens']} tokens" in result.output


def test_exits_stay_certified(drafter: Path, demo_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(demo_bundle, tmp_path / "bundle")
    write_certified(copy, certificate_of(copy))
    for _ in range(2):  # the second one replaces the first
        add_drafter(copy, drafter / DRAFTER)
        certification = read_certification(Bundle.open(copy))
        assert certification.certified, certification.sentence


def test_a_file_that_was_changed_is_refused(drafting_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(drafting_bundle, copy)
    path = copy / DRAFTER
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SedacError, match=DRAFTER):
        Bundle.open(copy)


def test_a_drafter_of_another_model_is_refused(
    drafter: Path, demo_bundle: Path, tmp_path: Path
) -> None:
    found = DrafterFile.load(drafter / DRAFTER)
    found.head_sample = found.head_sample.flip(0)
    found.save(tmp_path / DRAFTER)
    copy = tmp_path / "bundle"
    shutil.copytree(demo_bundle, copy)
    before = (copy / "bundle.json").read_bytes()
    with pytest.raises(SedacError, match="trained for another model"):
        add_drafter(copy, tmp_path / DRAFTER)
    (tmp_path / DRAFTER).write_bytes(b"nothing")
    with pytest.raises(SedacError, match="is not a drafter"):
        add_drafter(copy, tmp_path / DRAFTER)
    assert (copy / "bundle.json").read_bytes() == before


def test_without_one_only_auto_drafts(demo_bundle: Path) -> None:
    model = SedacModel.from_pretrained(demo_bundle)
    with pytest.raises(Exception, match="train-drafter"):
        model.generate(PROMPT, mode="lossless", drafter="trained", max_new_tokens=4)
    model.generate(PROMPT, mode="lossless", drafter="auto", max_new_tokens=4)


def test_the_command_prints_one_object(drafter: Path, demo_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(demo_bundle, copy)
    result = CliRunner().invoke(app, ["add-drafter", str(copy), str(drafter), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["feature_layers"] == [2, 6, 12]
    assert json.loads((drafter / "drafter-report.json").read_text())["steps"] > 0


def test_a_bundle_that_takes_no_drafter_is_refused_before_the_training(
    build_cache: BuildCache, tmp_path: Path
) -> None:
    request = BuildRequest(model=str(MODEL), output=tmp_path / "bundle", layers_per_engine=3)
    bundle, output = build_cache.bundle(request), tmp_path / "drafter"
    words = ["train-drafter", str(MODEL), "--data", json.__file__, "--bundle", str(bundle)]
    result = CliRunner().invoke(app, [*words, "--output", str(output)])
    assert "--layers-per-engine 1" in str(result.exception)
    assert not output.exists()
