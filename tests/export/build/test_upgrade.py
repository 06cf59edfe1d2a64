"""Bundles of schema 1 run as they did, once they are upgraded.

schema_1.tar.xz was made by the last sources that wrote schema 1: the bundle of a random Llama in
fp16, certified, with portable graphs and files in the place of TensorRT plans, and in runs.json
what the runtime of those sources generated from it.
"""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from bad_input.command import Result, assert_one_line_error, call, rewrite_manifest, snapshot
from conftest import THREADS, TinyBundle

import sedac_export.cli
from sedac_export import SedacError
from sedac_export.build import upgrade as module
from sedac_export.build.upgrade import upgrade_bundle
from sedac_export.bundle import Bundle
from sedac_export.bundle.agreement_row import GATES
from sedac_export.bundle.certified import read_certification
from sedac_export.bundle.plan_entries import BuildOptions
from sedac_export.bundle.portable_runner import PortableRunner
from sedac_export.cli.tensorrt_commands import flags
from sedac_export.device_graphs.agreement import compare
from sedac_runtime import SedacModel

ARCHIVE = Path(__file__).with_name("schema_1.tar.xz")
RTX = "tensorrt-rtx"
CONFIG = "sedac_config.json"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "bundle"


@pytest.fixture
def export(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    return lambda *arguments: call(sedac_export.cli.main, [str(a) for a in arguments], capfd)


def assert_runs_as_before(bundle: Path, runs: Path) -> None:
    model = SedacModel.from_pretrained(bundle, threads=THREADS)
    expected = json.loads(runs.read_text())
    assert {tuple(run["settings"]) for run in expected} >= {("forced_exit", "kv_fill"), ("mode",)}
    for run in expected:
        limits: dict[str, Any] = {"max_new_tokens": len(run["tokens"]), "stop_tokens": []}
        output = model.generate(run["prompt"], **run["settings"], **limits)
        assert output.tokens == run["tokens"], run
        assert output.exit_layers == run["exits"], run


def test_tokens_and_exits_and_certificate_are_the_same(older: Path) -> None:
    config = json.loads((older / CONFIG).read_text())
    upgraded = upgrade_bundle(older)
    assert upgraded.certified
    bundle = Bundle.open(older)
    assert bundle.manifest.engines.contexts == "onnx/contexts.onnx"
    assert_runs_as_before(older, older.parent / "runs.json")
    assert read_certification(bundle).certified
    config["certificate"]["setting"]["engines_sha256"] = bundle.files.engines_sha256
    assert json.loads((older / CONFIG).read_text()) == config


def test_an_output_leaves_the_old_bundle_as_it_is(older: Path, tmp_path: Path) -> None:
    before = snapshot(older)
    assert upgrade_bundle(older, tmp_path / "new").output == tmp_path / "new"
    assert snapshot(older) == before
    assert_runs_as_before(tmp_path / "new", tmp_path / "runs.json")
    with pytest.raises(SedacError, match="new exists; choose another --output"):
        upgrade_bundle(older, tmp_path / "new")


def test_embed_takes_tokens_and_contexts_takes_positions(older: Path) -> None:
    upgrade_bundle(older)
    values = {}
    for name in ("embed", "contexts", "portable_embed", "portable_contexts"):
        graph = onnx.load(older / "onnx" / f"{name}.onnx", load_external_data=False).graph
        values[name] = ([v.name for v in graph.input], [v.name for v in graph.output])
    assert values["embed"] == values["portable_embed"] == (["input_ids"], ["x"])
    contexts = (["position_ids"], ["context_0", "context_1"])
    assert values["contexts"] == values["portable_contexts"] == contexts


def test_portable_graphs_go_on_and_one_plan_is_built_again(
    older: Path, export: Callable[..., Result]
) -> None:
    plans = Bundle.open(older, older=True).manifest.plans[RTX].plans
    result = export("upgrade", older)
    assert result.code == 0
    assert f"sedac-export engines {older} --target {RTX} --max-prefill-chunk 20" in result.err
    assert "certificate was carried over" in result.err
    manifest = Bundle.open(older).manifest
    assert manifest.plans[RTX].plans == plans[1:]
    assert plans[0].graph == "onnx/portable_embed.onnx"
    assert not (older / plans[0].file).exists()
    assert manifest.portable is not None
    rows = compare(older, manifest, manifest.portable, PortableRunner(older, "fp16"), GATES["fp16"])
    assert [row["engine"] for row in rows][:2] == ["embed", "contexts"]
    assert all(row["passed"] for row in rows)


def test_options_are_named_as_on_the_command_line() -> None:
    options = BuildOptions(
        max_batch_size=2, compute_capabilities=["8.6", "12.0"], version_compatible=True
    )
    words = " --max-batch-size 2 --compute-capabilities 8.6,12.0 --version-compatible"
    assert flags(options) == words


def test_a_certificate_of_other_engines_stays_stale(older: Path) -> None:
    config = json.loads((older / CONFIG).read_text())
    config["certificate"]["setting"]["engines_sha256"] = "0" * 64
    (older / CONFIG).write_text(json.dumps(config))
    assert not upgrade_bundle(older).certified
    assert json.loads((older / CONFIG).read_text()) == config
    assert "have changed" in read_certification(Bundle.open(older)).sentence


def test_engines_that_give_other_bits_change_nothing(
    older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = module.split_embed

    def damaged(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto | None]:
        embed, contexts = split(model)
        assert contexts is not None
        sine = next(node for node in contexts.graph.node if node.op_type == "Sin")
        sine.op_type = "Tan"
        return embed, contexts

    monkeypatch.setattr(module, "split_embed", damaged)
    before = snapshot(older.parent)
    with pytest.raises(SedacError, match=r"embed\.onnx: its parts do not give the bits"):
        upgrade_bundle(older)
    assert snapshot(older.parent) == before


def test_a_bundle_without_contexts_keeps_its_engines(
    tiny_bundle: Callable[[str], TinyBundle], tmp_path: Path
) -> None:
    """GPT-2 has positions in its hidden states alone: nothing but the schema is another."""
    built = tiny_bundle("gpt2")[1]
    older = Path(shutil.copytree(built, tmp_path / "bundle"))
    rewrite_manifest(older, schema_version=1)
    upgrade_bundle(older)
    assert Bundle.open(older).manifest == Bundle.open(built).manifest
    assert "contexts" not in json.loads((older / "bundle.json").read_text())["engines"]


def test_what_cannot_be_upgraded_is_refused(
    older: Path, export: Callable[..., Result], tmp_path: Path
) -> None:
    upgrade_bundle(older, tmp_path / "new")
    assert_one_line_error(export("upgrade", tmp_path / "new"), "is of schema 2", "no upgrade")
    head = older / "onnx" / "head.onnx"
    head.write_bytes(head.read_bytes()[:-1])
    assert_one_line_error(export("upgrade", older), str(head), "truncated")
    assert_one_line_error(export("upgrade", tmp_path), str(tmp_path), "sedac-export build")


def test_a_signature_goes(older: Path, export: Callable[..., Result]) -> None:
    (older / "model.sig").write_text("of the old bundle")
    assert "model.sig was removed" in export("upgrade", older).err
    assert not (older / "model.sig").exists()
