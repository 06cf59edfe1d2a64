"""Search finds the best thresholds; calibrate certifies or writes nothing; reports add up."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from conftest import THREADS

from export.conftest import TrainedBundle
from sedac_export.bundle import Bundle
from sedac_export.bundle.certified import read_certification
from sedac_export.bundle.exit_config import ExitConfig, MeasuredGeneration, read_exit_config
from sedac_export.errors import SedacError
from sedac_export.exits.calibration import calibrate as calibration
from sedac_export.exits.calibration import exit_report as reporting
from sedac_export.exits.calibration import generation_speed as generation
from sedac_export.exits.calibration.calibrate import (
    CalibrationRequest,
    CalibrationRun,
    calibrate,
)
from sedac_export.exits.calibration.engine_times import EngineTimes
from sedac_export.exits.calibration.exit_report import make_report
from sedac_export.exits.calibration.exit_report_page import write_report
from sedac_export.exits.calibration.observe import Observations
from sedac_export.exits.calibration.search import judge, pareto, search
from sedac_export.exits.replay.documents import Document, split_documents
from sedac_export.exits.replay.replay import Replay
from sedac_runtime import SedacModel

GENERATION = MeasuredGeneration(
    speedup=1.5,
    speedup_without_drafter=1.2,
    lossless_speedup=1.4,
    agreement=0.99,
    tokens=2048,
)
COSTS = EngineTimes(
    num_layers=4, layer=1.0, fill=0.1, waiting=0.1, exit=0.1, lens=0.0, head=1.0, embed=0.1
)


def test_only_tokens_that_exit_pay_for_the_lens() -> None:
    depths, checks = np.array([2, 4]), np.array([1, 1])
    plain, through = (
        replace(COSTS, lens=lens).of(depths, checks, "propagate") for lens in (0.0, 0.5)
    )
    assert through - plain == pytest.approx([0.5, 0.0])


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test measures time."""
    times = replace(COSTS, num_layers=12)
    for module in (calibration, reporting):
        monkeypatch.setattr(module, "time_config", lambda *_: 1.25)
    monkeypatch.setattr(calibration, "measure_engine_times", lambda _: times)
    monkeypatch.setattr(calibration, "measure_generation", lambda *_: ("early-exit", GENERATION))


def observations(tokens: int = 4000) -> Observations:
    """At depth 2 a score of s is right with probability s; at depth 1 scores say nothing."""
    generator = np.random.default_rng(0)
    sure = generator.random(tokens).astype(np.float32)
    right = generator.random(tokens) < sure
    full = generator.integers(0, 50, tokens)
    useless = generator.random(tokens).astype(np.float32)
    return Observations(
        num_layers=4,
        full=full,
        full_entropy=useless,
        stability=np.full((tokens, 4), 0.5, dtype=np.float32),
        tokens={1: full + 1, 2: np.where(right, full, full + 1)},
        margin={1: useless, 2: useless},
        learned={1: useless, 2: sure},
        risk={},
    )


def test_search_finds_the_informative_depth() -> None:
    seen = observations()
    found = [
        c for c in search(seen, COSTS, "propagate") if c.config.policy == "learned" and c.risk < 0.1
    ]
    best = max(found, key=lambda c: c.speedup)
    assert list(best.config.thresholds or {}) == [2]
    # exits above t are wrong in (1 - t) / 2 of the cases, of all tokens (1 - t)^2 / 2
    threshold = (best.config.thresholds or {})[2]
    assert best.risk == pytest.approx((1 - threshold) ** 2 / 2, abs=0.01)
    by_hand = judge(seen, COSTS, best.config)
    exits = 1 - threshold
    time = 0.1 + 1.0 + 0.1 + exits * (2 + 0.2) + (1 - exits) * 4
    assert by_hand.speedup == pytest.approx(COSTS.full / time, rel=0.02)


def test_pareto_keeps_what_nothing_beats() -> None:
    front = pareto(search(observations(), COSTS, "propagate"))
    assert [c.risk for c in front] == sorted(c.risk for c in front)
    assert [c.speedup for c in front] == sorted(c.speedup for c in front)


def test_a_setting_without_an_error_can_be_chosen() -> None:
    seen = observations()
    seen = replace(seen, tokens=seen.tokens | {2: seen.full})
    run = SimpleNamespace(replay=None, searched=seen, engine_times=COSTS)
    request = CalibrationRequest(Path(), [], "speed", max_risk=0.01)
    (chosen,) = calibration._choose(request, cast(CalibrationRun, run))
    assert chosen.risk == 0
    assert chosen.speedup > 1.2


def test_splits_are_by_document_and_even() -> None:
    lengths = (10, 400, 30, 50, 200, 310, 7, 90)
    whole = [Document(str(n), np.zeros(n, dtype=np.int64), str(n)) for n in lengths]
    one, two = split_documents(whole, (0.5, 0.5))
    assert sorted(d.name for d in one + two) == sorted(d.name for d in whole)
    sizes = [sum(len(d.tokens) for d in group) for group in (one, two)]
    assert abs(sizes[0] - sizes[1]) < 60


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("trained", ["trained_bundle", "int4_bundle"])
def test_a_certified_setting_is_written(
    trained: str, request: pytest.FixtureRequest, documents: list[Document], tmp_path: Path
) -> None:
    directory, _ = request.getfixturevalue(trained)
    bundle = shutil.copytree(directory, tmp_path / "bundle")
    # seven short documents, so a generous risk
    many = [Document(d.name, d.tokens[k::2], f"{d.sha256}{k}") for d in documents for k in (0, 1)]
    # a damaged certificate is what calibrating again is the remedy for
    (bundle / "sedac_config.json").write_text('{"certificate": {"risk_bound": 0.01}}')
    with pytest.raises(SedacError, match="run sedac-export calibrate again"):
        read_exit_config(bundle)
    result = calibrate(CalibrationRequest(bundle, many, "speed", max_risk=0.5, confidence=0.8))
    written = read_exit_config(bundle)
    assert written == result.config
    certificate = written.certificate
    assert certificate is not None
    assert certificate.observed_risk < certificate.risk_bound <= 0.5
    assert certificate.layer_ratio > 1
    assert certificate.setting.policy["policy"] == written.policy
    assert certificate.speedup == 1.25
    assert (written.drafter, certificate.generation) == ("early-exit", GENERATION)
    assert read_certification(Bundle.open(bundle)).certified
    model = SedacModel.from_pretrained(bundle, threads=THREADS)
    output = model.generate("def push(self, item):\n", mode="exit", max_new_tokens=8)
    assert (output.drafter, output.kv_fill) == ("early-exit", "defer")
    assert output.certificate is not None


def test_generation_is_measured_in_every_way(
    trained_bundle: TrainedBundle, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "THREADS", THREADS)
    monkeypatch.setattr(generation, "PROMPTS", 3)
    monkeypatch.setattr(generation, "NEW_TOKENS", 12)
    bundle, _ = trained_bundle
    before = (bundle / "sedac_config.json").read_bytes()
    replay = Replay(Bundle.open(bundle), THREADS)
    never = ExitConfig(policy="learned", thresholds={4: 1.0}, kv_fill="defer")
    _, measured = generation.measure_generation(replay, never, documents)
    assert (measured.agreement, measured.tokens) == (1.0, 36)
    assert (bundle / "sedac_config.json").read_bytes() == before
    prompts = generation.cut_prompts(documents, 1024, 3)
    assert [len(prompt) for prompt in prompts] == [128] * 3
    # the first layers alone often guess wrong
    shallow = ExitConfig(tau=0.0, consecutive_k=1, min_layer_ratio=0.0, kv_fill="propagate")
    drafter, measured = generation.measure_generation(replay, shallow, documents)
    assert drafter is None
    assert measured.speedup == measured.speedup_without_drafter
    assert measured.agreement < 1


def test_no_text_is_drafted_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Model:
        core = SimpleNamespace(forget_texts=lambda: calls.append("forget"))

        def generate(self, prompt: list[int], **_: object) -> SimpleNamespace:
            calls.append("generate")
            return SimpleNamespace(decode_ms=1.0, tokens=prompt)

    monkeypatch.setattr(SedacModel, "from_pretrained", lambda *_, **__: Model())
    generation.time_setups(Path(), [generation.FULL, generation.PLAIN], [[1], [2]])
    assert calls == ["forget", "generate"] * 6


def test_the_fastest_drafter_is_written_and_lossless_beside_it(
    trained_bundle: TrainedBundle, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {("exit", "none"): 80.0, ("exit", "auto"): 50.0, ("lossless", "prompt-lookup"): 40.0}

    def timed(
        _: Path, setups: list[generation.DecodingSetup], *__: object
    ) -> dict[generation.DecodingSetup, object]:
        return {
            setup: generation.TimedRuns(times.get(setup, 100.0), [([1], [2])]) for setup in setups
        }

    monkeypatch.setattr(generation, "time_setups", timed)
    bundle, _ = trained_bundle
    replay = Replay(Bundle.open(bundle), THREADS)
    config = ExitConfig(kv_fill="defer")
    drafter, measured = generation.measure_generation(replay, config, documents)
    assert (drafter, measured.speedup) == ("auto", 2.0)
    assert (measured.speedup_without_drafter, measured.lossless_speedup) == (1.25, 2.5)
    times["exit", "none"] = 45.0
    assert generation.measure_generation(replay, config, documents)[0] is None


@pytest.mark.usefixtures("untimed")
def test_what_cannot_be_certified_is_not_written(
    trained_bundle: TrainedBundle, documents: list[Document], tmp_path: Path
) -> None:
    bundle = shutil.copytree(trained_bundle[0], tmp_path / "bundle")
    before = (bundle / "sedac_config.json").read_bytes()
    many = [Document(d.name, d.tokens[k::2], f"{d.sha256}{k}") for d in documents for k in (0, 1)]
    with pytest.raises(SedacError, match="tokens cannot certify a risk of"):
        calibrate(CalibrationRequest(bundle, many, max_risk=0.0005))
    with pytest.raises(SedacError, match="below --min-speedup 9"):
        calibrate(CalibrationRequest(bundle, many, max_risk=0.5, confidence=0.8, min_speedup=9))
    with pytest.raises(SedacError, match=r"--max-risk 1\.5 is out of range"):
        calibrate(CalibrationRequest(bundle, many, max_risk=1.5))
    assert (bundle / "sedac_config.json").read_bytes() == before


@pytest.mark.usefixtures("untimed")
def test_a_report_has_a_row_for_each_setting(
    trained_bundle: TrainedBundle, documents: list[Document], tmp_path: Path, quick: bool
) -> None:
    bundle = shutil.copytree(trained_bundle[0], tmp_path / "bundle")
    never = ExitConfig(tau=2.0)
    (bundle / "sedac_config.json").write_text(never.to_json())
    length = 300 if quick else None
    texts = [replace(document, tokens=document.tokens[:length]) for document in documents[:2]]
    report = make_report(bundle, texts, full=True)
    rows = json.loads(report.to_json())["rows"]
    assert [row["policy"] for row in rows].count("stability") == 1 + 10
    assert {row["policy"] for row in rows} == {
        *("stability", "probe", "cascade", "margin", "learned")
    }
    assert [row["kv_fill"] for row in rows] == ["propagate"] + ["defer"] * (len(rows) - 1)
    own = rows[0]
    assert (own["agreement"], own["layer_ratio"], own["exit_rate"]) == (1.0, 1.0, 0.0)
    assert (own["perplexity_change"], own["certified"]) == (0.0, False)
    for row in rows:
        assert row["layer_ratio"] == pytest.approx(12 / row["mean_exit_layer"])
        assert 0 <= row["high_risk_rate"] <= row["exit_rate"] <= 1
    write_report(report, bundle, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "exits not certified (the bundle has no certificate" in page
    assert "http" not in page.replace("data:image", "")
    assert {f.suffix for f in (tmp_path / "report").iterdir()} == {".html", ".png"}
