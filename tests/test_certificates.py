"""Nothing is called certified but what was, and a certificate that is not whole is damage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_input.command import assert_one_line_error, call, parse_only_json, rewrite_manifest
from certificates import certificate_of, write_certified
from conftest import THREADS

import sedac_export.cli
import sedac_runtime.cli
from sedac_export.bundle import Bundle
from sedac_export.bundle.certified import read_certification
from sedac_export.bundle.hashing import sha256
from sedac_runtime import GenerationOutput, SedacModel

PROMPT = "class Stack:\n    def push(self, item):\n"


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """The demo bundle, certified with drafter early-exit."""
    copy = shutil.copytree(demo_bundle, tmp_path / "bundle")
    write_certified(copy, certificate_of(copy, "early-exit"))
    return copy


@pytest.fixture
def generate(bundle: Path) -> Callable[..., GenerationOutput]:
    """Load the bundle as it is by then, and generate a little."""

    def run(**settings: Any) -> GenerationOutput:
        model = SedacModel.from_pretrained(bundle, threads=THREADS)
        return model.generate(PROMPT, max_new_tokens=4, **{"mode": "exit", **settings})

    return run


def test_only_what_was_certified_is_called_so(
    bundle: Path, generate: Callable[..., GenerationOutput]
) -> None:
    certificate = certificate_of(bundle, "early-exit")
    for same in ({}, {"tau": 0.98, "kv_fill": "defer"}, {"seed": 3}):
        output = generate(**same)
        assert output.certificate == certificate
        assert output.certification is not None
        assert output.certification.startswith("exits certified for given text and argmax: at most")
        assert "sampling and free generation are not certified" in output.certification
    for other, reason in (
        ({"tau": 0.97}, "policy's settings"),
        ({"kv_fill": "propagate"}, "kv_fill propagate, certified with defer"),
        ({"drafter": "none"}, "drafter none, certified with early-exit"),
        ({"temperature": 0.7}, "sampled"),
        ({"repetition_penalty": 1.2}, "penalised"),
        ({"top_k": 5}, "sampled"),
        ({"forced_exit": [3]}, "forced"),
    ):
        output = generate(**other)
        assert output.certificate is None
        assert output.certification is not None
        assert output.certification.startswith("exits not certified (")
        assert reason in output.certification
    for mode in ("full", "lossless"):
        output = generate(mode=mode)
        assert (output.certificate, output.certification) == (None, None)


@pytest.mark.parametrize("changes", [{"tau": 0.9}, {"min_layer_ratio": 0.1}, {"drafter": "auto"}])
def test_a_certificate_beside_other_settings_certifies_nothing(
    changes: dict[str, Any], bundle: Path, generate: Callable[..., GenerationOutput]
) -> None:
    write_certified(bundle, certificate_of(bundle, "early-exit"), **changes)
    assert generate().certificate is None
    assert not read_certification(Bundle.open(bundle)).certified


def test_changed_weights_end_a_certificate(
    bundle: Path, generate: Callable[..., GenerationOutput]
) -> None:
    name = "onnx/layer_003.data"
    path = bundle / name
    weights = bytearray(path.read_bytes())
    weights[0] ^= 1
    path.write_bytes(weights)
    files = json.loads((bundle / "bundle.json").read_text())["files"]
    rewrite_manifest(bundle, files=files | {name: files[name] | {"sha256": sha256(path)}})
    output = generate()
    assert output.certificate is None
    assert "engines have changed" in (output.certification or "")


def test_the_same_words_are_shown_everywhere(
    bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sentence = read_certification(Bundle.open(bundle)).sentence
    assert "at most 0.99% of tokens" in sentence
    words = ["generate", "--engines", str(bundle), "--prompt", PROMPT, "--max-new-tokens", "2"]
    words += ["--mode", "exit"]
    shown = call(sedac_runtime.cli.main, words, capfd)
    assert shown.err.splitlines()[-1] == sentence
    warned = call(sedac_runtime.cli.main, [*words, "--temperature", "1"], capfd)
    assert warned.err.splitlines()[-1].startswith("warning: exits not certified (")
    printed = parse_only_json(call(sedac_runtime.cli.main, [*words, "--json"], capfd))
    assert printed["certification"] == sentence
    inspected = call(sedac_export.cli.main, ["inspect", str(bundle)], capfd)
    assert sentence in " ".join(inspected.out.split())
    facts = parse_only_json(call(sedac_export.cli.main, ["inspect", str(bundle), "--json"], capfd))
    assert (facts["certified"], facts["certification"]) == (True, sentence)


@pytest.mark.parametrize(
    "place", ["risk_bound", "generation", "setting", "setting.policy.tau", "setting.drafter"]
)
def test_a_certificate_with_a_field_missing_is_damage(
    place: str, bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    certificate = json.loads(json.dumps(certificate_of(bundle, "early-exit")))
    *parents, name = place.split(".")
    holder = certificate
    for parent in parents:
        holder = holder[parent]
    del holder[name]
    write_certified(bundle, certificate_of(bundle), certificate=certificate)
    words = ("sedac_config.json", name, "run sedac-export calibrate again")
    run = ["generate", "--engines", str(bundle), "--prompt", PROMPT]
    assert_one_line_error(call(sedac_runtime.cli.main, run, capfd), *words)
    inspect = ["inspect", str(bundle)]
    assert_one_line_error(call(sedac_export.cli.main, inspect, capfd), *words)
