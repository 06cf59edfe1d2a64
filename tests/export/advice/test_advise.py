"""The report: what was measured, certificates of calibrate, and the commands that follow it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from export.conftest import TrainedBundle
from sedac_export.advice import advise as advising
from sedac_export.advice.advice_page import advice_page
from sedac_export.advice.advise import advise
from sedac_export.advice.time_modes import TimedMode
from sedac_export.cli.commands import app
from sedac_export.errors import SedacError
from sedac_export.exits.calibration import calibrate as calibration
from sedac_export.exits.calibration.engine_times import EngineTimes
from sedac_export.exits.replay.documents import Document
from sedac_runtime import SedacModel
from sedac_runtime._core import DecodingSetting

RISKS = (0.0001, 0.5)
TIMES = EngineTimes(
    num_layers=12, layer=1.0, fill=0.1, waiting=0.1, exit=0.1, lens=0.0, head=1.0, embed=0.1
)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """No test measures time: prompt lookup takes half of full depth's, exits a quarter.

    Collects the prompts.
    """
    prompts_seen: list[list[int]] = []

    def timed(
        model: SedacModel,
        settings: Mapping[str, DecodingSetting],
        prompts: Sequence[list[int]],
        _: object,
    ) -> dict[str, TimedMode]:
        prompts_seen.extend(prompts)
        result = {}
        for name, setting in settings.items():
            factor = {"exit": 0.25, "lossless": 1.0, "full": 1.0}[setting.mode]
            if setting.drafter == "prompt-lookup":
                factor /= 2
            texts = [(p, model.generate(p, mode="full", max_new_tokens=4).tokens) for p in prompts]
            result[name] = TimedMode(np.full((len(prompts), 3), 10.0 * factor), 6.0, texts)
        return result

    monkeypatch.setattr(advising, "time_modes", timed)
    monkeypatch.setattr(advising, "RISKS", RISKS)
    monkeypatch.setattr(calibration, "measure_engine_times", lambda _: TIMES)
    return prompts_seen


def many(documents: list[Document]) -> list[Document]:
    return [Document(d.name, d.tokens[k::2], f"{d.sha256}{k}") for d in documents for k in (0, 1)]


def test_every_mode_has_a_row_and_exits_their_certificate(
    trained_bundle: TrainedBundle, documents: list[Document], untimed: list[list[int]]
) -> None:
    bundle, _ = trained_bundle
    before = {path: path.read_bytes() for path in bundle.glob("*.json")}
    texts = many(documents)
    advice = advise(bundle, texts, 3)
    assert {path: path.read_bytes() for path in bundle.glob("*.json")} == before
    rows = [(row.mode, row.drafter, row.max_risk) for row in advice.rows]
    drafters = ("auto", "early-exit", "prompt-lookup")
    lossless = [("lossless", drafter, None) for drafter in drafters]
    assert rows[:4] == [("full", "none", None), *lossless]
    assert set(rows[4:]) == {("exit", drafter, 0.5) for drafter in ("none", *drafters)}
    assert {row.agreement for row in advice.rows} == {1.0}
    assert [row.layer_ratio for row in advice.rows] == [2.0] * len(rows)
    refused, certified = advice.exits
    assert "tokens cannot certify a risk of 0.0001" in (refused.refusal or "")
    assert certified.config is not None and certified.layer_ratio is not None
    assert certified.observed_risk is not None and certified.risk_bound is not None
    assert certified.observed_risk < certified.risk_bound <= 0.5
    assert certified.layer_ratio > 1
    assert advice.recommendation.chosen.drafter == "prompt-lookup"
    assert [row.drafter for row in advice.recommendation.exits] == ["prompt-lookup"]
    assert "--mode lossless --drafter prompt-lookup" in advice.commands[0]
    assert "--max-risk 0.5" in advice.commands[1]
    # prompts are not of the documents that the setting was chosen on
    _, certifying = calibration.split_documents(texts, (0.45, 0.55))
    sources = [" ".join(map(str, d.tokens)) for d in certifying]
    for prompt in untimed:
        assert any(" ".join(map(str, prompt)) in source for source in sources)


@pytest.mark.usefixtures("untimed")
def test_the_page_says_first_what_to_do(
    trained_bundle: TrainedBundle, documents: list[Document]
) -> None:
    advice = advise(trained_bundle[0], many(documents), 2)
    page = advice_page(advice)
    assert page.startswith("**Use lossless mode with prompt lookup: 2.00x; where some tokens may")
    assert page.count("\n| ") == 2 + len(advice.rows)
    assert "Exits at 0.01 % risk: " in page
    assert "train-drafter MODEL" in page and "train-exits" not in page
    facts = json.loads(advice.to_json())
    assert facts["sentence"] == advice.recommendation.sentence
    assert facts["rows"][0]["speedup"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert facts["exits"][1]["config"]["policy"]


@pytest.mark.usefixtures("untimed")
def test_without_trained_parts_the_page_says_how_to_try_them(
    demo_bundle: Path, documents: list[Document]
) -> None:
    # too few of them to certify anything
    advice = advise(demo_bundle, [replace(d, tokens=d.tokens[:60]) for d in documents[:4]], 2)
    assert ["documents are too few" in (e.refusal or "") for e in advice.exits] == [True, True]
    assert [row.mode for row in advice.rows] == ["full", *["lossless"] * 3]
    assert "train-exits" in advice_page(advice)


@pytest.mark.usefixtures("untimed")
def test_the_command_prints_one_object_or_the_page(
    demo_bundle: Path, texts: list[Path], tmp_path: Path
) -> None:
    data = [part for text in texts[:4] for part in ("--data", str(text))]
    arguments = ["advise", str(demo_bundle), *data, "--prompts", "2"]
    report = tmp_path / "report.md"
    printed = CliRunner().invoke(app, [*arguments, "--json", "--output", str(report)])
    assert printed.exit_code == 0, printed.output
    sentence = json.loads(printed.stdout)["sentence"]
    assert report.read_text().startswith(f"**{sentence}**")


def test_what_cannot_be_advised_on_is_refused(
    demo_bundle: Path, documents: list[Document], texts: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(SedacError, match="--prompts 1 is out of range"):
        advise(demo_bundle, documents, 1)
    with pytest.raises(SedacError, match="give more files"):
        advise(demo_bundle, documents[:1], 4)
    result = CliRunner().invoke(app, ["advise", str(tmp_path), "--data", str(texts[0])])
    assert isinstance(result.exception, SedacError)
    assert f"sedac-export build --model {tmp_path}" in str(result.exception)
