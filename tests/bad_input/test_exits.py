"""What the commands about exits cannot use: one line, nothing changed."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import THREADS
from safetensors.numpy import load_file, save_file

from bad_input.command import Command, assert_one_line_error, rewrite_manifest, snapshot
from sedac_export.bundle import Bundle
from sedac_export.exits.calibration import wall_clock
from sedac_export.exits.replay.documents import read_documents
from sedac_export.exits.training.collect import layout
from sedac_export.exits.training.train_probes import exit_depths, probe_depths

TEXT = "def push(self, item):\n    self.items.append(item)\n" * 20


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text(TEXT)
    return path


@pytest.fixture
def long_texts(text: Path) -> list[Path]:
    """Two that are enough to train on."""
    text.write_text(TEXT * 4)
    second = text.with_name("second.py")
    second.write_text(TEXT * 4 + "# another\n")
    return [text, second]


def enough_for_one(bundle: Path, texts: list[Path]) -> int:
    """Bytes that the largest of `texts` takes in a collection at all depths."""
    opened = Bundle.open(bundle)
    depths = sorted({*exit_depths(opened.manifest, None), *probe_depths(opened.manifest, None)})
    fields = layout(opened.manifest, depths).values()
    most = max(len(document.tokens) for document in read_documents(opened, texts))
    return most * sum(np.dtype(kind).itemsize * size for kind, size in fields)


def arguments(command: str, bundle: Path, *data: Path) -> list[str]:
    output = (
        []
        if command in ("train-probes", "train-exits", "calibrate")
        else ["--output", f"{bundle}-out"]
    )
    return [command, str(bundle), "--data", *map(str, data), *output]


COMMANDS = ("collect", "train-probes", "train-exits", "calibrate", "report")


@pytest.mark.parametrize("command", COMMANDS)
def test_unusable_texts_are_named(
    command: str, export: Command, bundle: Path, text: Path, tmp_path: Path
) -> None:
    damaged = {"empty.py": b"", "blank.py": b" \n", "latin.py": b"caf\xe9\n" * 9}
    before = snapshot(bundle)
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        assert_one_line_error(export(*arguments(command, bundle, text, tmp_path / name)), name)
    missing = tmp_path / "missing.py"
    assert_one_line_error(export(*arguments(command, bundle, missing)), "missing.py")
    assert snapshot(bundle) == before
    assert not Path(f"{bundle}-out").exists()


@pytest.mark.parametrize("command", ["collect", "train-probes", "train-exits", "calibrate"])
def test_a_bundle_whose_tokens_never_exit_early_is_refused(
    command: str, export: Command, bundle: Path, long_texts: list[Path]
) -> None:
    rewrite_manifest(bundle, exit_layers=Bundle.open(bundle).manifest.exit_layers[-1:])
    before = snapshot(bundle)
    assert_one_line_error(
        export(*arguments(command, bundle, *long_texts)), "no token exits early", "--exit-layers"
    )
    assert snapshot(bundle) == before


@pytest.mark.parametrize("command", ["train-probes", "train-exits", "calibrate"])
def test_too_little_data_is_refused(
    command: str, export: Command, bundle: Path, text: Path
) -> None:
    before = snapshot(bundle)
    assert_one_line_error(export(*arguments(command, bundle, text)), "document")
    assert snapshot(bundle) == before


def test_too_little_of_what_was_collected_is_refused(
    export: Command, bundle: Path, long_texts: list[Path], tmp_path: Path
) -> None:
    short = tmp_path / "short.py"
    short.write_text("x")
    assert len(read_documents(Bundle.open(bundle), [short])[0].tokens) == 1
    before = snapshot(bundle)
    command = arguments("train-probes", bundle, *long_texts)
    assert_one_line_error(
        export(*command, "--max-bytes", enough_for_one(bundle, long_texts)),
        "documents: 1",
        "--max-bytes, which left out 1",
    )
    many = long_texts[0].with_name("many.py")
    many.write_text(TEXT * 8)
    assert_one_line_error(export(*arguments("train-probes", bundle, many, short)), "documents: 1")
    assert snapshot(bundle) == before


def test_training_says_what_the_limit_left_out(
    export: Command, bundle: Path, long_texts: list[Path]
) -> None:
    third = long_texts[0].with_name("third.py")
    third.write_text(TEXT * 8 + "# the third\n")
    limit = 2 * enough_for_one(bundle, long_texts)
    command = arguments("train-probes", bundle, *long_texts, third)
    result = export(*command, "--exit-layers", "2", "--max-bytes", limit, "--json")
    assert result.code == 0, result
    assert "1 of 3 documents left out (--max-bytes)" in " ".join(result.err.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bundle_without_tokenizer_reads_no_texts(
    command: str, export: Command, mute_bundle: Path, text: Path
) -> None:
    assert_one_line_error(export(*arguments(command, mute_bundle, text)), "no tokenizer")


def test_a_tokenizer_of_another_model_is_refused(export: Command, bundle: Path, text: Path) -> None:
    facts = json.loads((bundle / "bundle.json").read_text())["model"]
    rewrite_manifest(bundle, model=facts | {"vocab_size": 16})
    assert_one_line_error(export(*arguments("report", bundle, text)), "tokenizer", "16")


def test_settings_out_of_range_are_refused(export: Command, bundle: Path, text: Path) -> None:
    for option, value in (("--max-risk", "0"), ("--confidence", "1"), ("--min-speedup", "-1")):
        result = export(*arguments("calibrate", bundle, text), option, value)
        assert_one_line_error(result, option, "out of range")
    for option, value in (("--exit-layers", "9"), ("--probe-layers", "x")):
        result = export(*arguments("train-probes", bundle, text), option, value)
        assert_one_line_error(result, option, value)
    for value in ("9", "x"):
        result = export(*arguments("train-exits", bundle, text), "--depths", value)
        assert_one_line_error(result, "--depths", value)


def test_outputs_are_checked_before_the_work(
    export: Command, bundle: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sedac_export.exits.calibration.exit_report.make_report", None)
    monkeypatch.setattr("sedac_export.advice.advise.advise", None)
    before = text.read_text()
    report = ["report", str(bundle), "--data", str(text), "--output"]
    for output in (text, text / "below", bundle):
        assert_one_line_error(export(*report, output), f"--output {output}", "another directory")
    advise = ["advise", *report[1:]]
    for output in (bundle, text / "below.md", bundle / "missing" / "advice.md"):
        assert_one_line_error(export(*advise, output), f"--output {output}", "another file")
    assert text.read_text() == before


def test_a_report_from_inside_of_the_bundle_is_beside_it(
    export: Command, bundle: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wall_clock, "THREADS", THREADS)
    monkeypatch.chdir(bundle)
    result = export("report", ".", "--data", text)
    assert result.code == 0, result
    assert (bundle.parent / "bundle-report" / "report.html").exists()


def test_a_collection_of_another_model_is_refused(
    export: Command, bundle: Path, text: Path, tmp_path: Path
) -> None:
    collected = tmp_path / "collected"
    command = ["collect", str(bundle), "--data", str(text), "--output", str(collected)]
    assert export(*command).code == 0
    index = collected / "collection.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"fingerprint": "another"}))
    before = snapshot(collected)
    assert_one_line_error(export(*command), "another model")
    assert snapshot(collected) == before
    index.write_text("{")
    assert_one_line_error(export(*command), "collection.json")
    assert_one_line_error(export(*command[:-1], str(tmp_path)), "neither a collection")


@pytest.mark.parametrize("place", [".", "onnx", "made/later"])
def test_what_is_written_is_not_in_a_bundle(
    export: Command, bundle: Path, text: Path, tmp_path: Path, place: str
) -> None:
    """A change of the bundle would remove it."""
    before = snapshot(bundle)
    (tmp_path / "link").symlink_to(bundle)
    inside = [bundle / place, tmp_path / "link" / place]
    for directory in inside:
        for command, option in (
            (["collect", bundle], "--output"),
            (["report", bundle], "--output"),
            (["train-probes", bundle], "--collection"),
            (["train-exits", bundle], "--collection"),
            (["train-drafter", "no/model"], "--output"),
        ):
            result = export(*command, "--data", text, option, directory)
            assert_one_line_error(result, f"{option} {directory} is in the bundle {bundle}")
    assert snapshot(bundle) == before


def test_advice_is_not_written_into_a_bundle(export: Command, bundle: Path, text: Path) -> None:
    output = bundle / "advice.md"
    result = export("advise", bundle, "--data", text, "--output", output)
    assert_one_line_error(result, f"--output {output} is in the bundle {bundle}", "another file")
    assert not output.exists()


@pytest.mark.parametrize(
    ("command", "option"), [("collect", "--output"), ("train-probes", "--collection")]
)
def test_a_collection_is_no_file(
    export: Command, bundle: Path, text: Path, command: str, option: str
) -> None:
    result = export(command, bundle, "--data", text, option, text)
    assert_one_line_error(result, f"{option} {text} cannot be written", "give another directory")


def test_a_damaged_collection_is_refused(
    export: Command, bundle: Path, long_texts: list[Path], tmp_path: Path
) -> None:
    collected = tmp_path / "collected"
    command = ["collect", str(bundle), "--data", str(long_texts[0]), "--output", str(collected)]
    train = arguments("train-probes", bundle, *long_texts)
    assert export(*command).code == 0
    token = collected / "token"
    whole = token.read_bytes()
    for damaged in (whole[:-4], b""):
        token.write_bytes(damaged)
        before = snapshot(collected)
        for again in (command, [*train, "--collection", str(collected)]):
            result = export(*again)
            assert_one_line_error(result, str(token), f"{len(damaged)} bytes", "delete")
        assert snapshot(collected) == before
    token.unlink()
    assert_one_line_error(export(*command), str(token), "delete")


def test_a_collection_of_other_data_is_refused(
    export: Command, bundle: Path, long_texts: list[Path], tmp_path: Path
) -> None:
    first, second = long_texts
    third = first.with_name("third.py")
    third.write_text(TEXT * 4 + "# the third\n")
    collected = tmp_path / "collected"
    assert export("collect", bundle, "--data", first, "--output", collected).code == 0
    before = snapshot(collected), snapshot(bundle)
    keep = ["--exit-layers", "1,2,3", "--collection", collected]
    result = export(*arguments("train-probes", bundle, second, third), *keep)
    assert_one_line_error(result, str(collected), str(first), "--data")
    result = export("collect", bundle, "--data", second, "--output", collected)
    assert_one_line_error(result, str(collected), str(first), "--data")
    assert (snapshot(collected), snapshot(bundle)) == before
    # more of the same data is gone on with
    assert export(*arguments("train-probes", bundle, second, first), *keep).code == 0
    index = json.loads((collected / "collection.json").read_text())
    assert [d["name"] for d in index["documents"]] == [str(first), str(second)]


CONFIGS = [
    ({"policy": "margin"}, "thresholds"),
    ({"policy": "margin", "thresholds": {"2": 1.5}}, "thresholds.2"),
    ({"policy": "margin", "thresholds": {}}, "thresholds"),
    ({"policy": "probe", "thresholds": {"2": 0.0}}, "above 0"),
    ({"policy": "learned", "thresholds": {"2": 0.5}, "tau": 0.9}, "tau"),
    ({"policy": "cascade", "thresholds": {"2": 0.5}, "weights": {"2": 1}}, "targets"),
    (
        {"policy": "cascade", "thresholds": {"2": 1}, "weights": {"1": 1}, "targets": {"2": 1}},
        "weights",
    ),
    ({"policy": "stability", "certificate": {"max_risk": 2}}, "certificate"),
    ({"policy": "stability", "drafter": "auto"}, "kv_fill defer"),
    ({"policy": "stability", "kv_fill": "defer", "drafter": "none"}, "drafter"),
]


@pytest.mark.parametrize(("config", "word"), CONFIGS)
def test_an_edited_configuration_is_refused(
    config: dict[str, object], word: str, export: Command, bundle: Path, text: Path
) -> None:
    path = bundle / "sedac_config.json"
    path.write_text(json.dumps(config))
    assert_one_line_error(export(*arguments("report", bundle, text)), str(path), word)


def test_depths_that_are_no_exits_are_refused(export: Command, bundle: Path, text: Path) -> None:
    config = {"policy": "margin", "thresholds": {"9": 0.5}}
    (bundle / "sedac_config.json").write_text(json.dumps(config))
    assert_one_line_error(export(*arguments("report", bundle, text)), "thresholds.9")


@pytest.mark.parametrize("name", ["probes.safetensors", "lens.safetensors"])
def test_probes_of_another_model_are_refused(
    name: str, export: Command, bundle: Path, long_texts: list[Path]
) -> None:
    trained = export(
        *arguments("train-probes", bundle, *long_texts),
        *("--exit-layers", "2", "--probe-layers", "2", "--lens"),
    )
    assert trained.code == 0, trained
    assert "with lens" in trained.out
    probes = bundle / name
    save_file(load_file(probes), probes, {"model": "x", "head_sha256": "0", "median_risk": "{}"})
    files = json.loads((bundle / "bundle.json").read_text())["files"]
    from sedac_export.bundle.hashing import sha256

    files[name] = {"bytes": probes.stat().st_size, "sha256": sha256(probes)}
    rewrite_manifest(bundle, files=files)
    report = export(*arguments("report", bundle, *long_texts))
    assert_one_line_error(report, "probes", "another model")
