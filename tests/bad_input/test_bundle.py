"""A damaged bundle is refused by whatever reads it, naming the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bad_input.command import (
    Command,
    Result,
    assert_one_line_error,
    parse_only_json,
    rewrite_manifest,
    snapshot,
)

Reader = Callable[[Path], Result]


@pytest.fixture(params=["generate", "bench", "inspect"])
def read(request: pytest.FixtureRequest, export: Command, runtime: Command) -> Reader:
    """A command that reads a bundle."""
    readers: dict[str, Reader] = {
        "generate": lambda bundle: runtime("generate", "--engines", bundle, "--prompt", "def f"),
        "bench": lambda bundle: runtime(
            *("bench", "--engines", bundle, "--prompt-tokens", 1, "--new-tokens", 2, "--repeat", 1)
        ),
        "inspect": lambda bundle: export("inspect", bundle),
    }
    return readers[request.param]


def miss(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        "onnx/embed.onnx",
        "onnx/kv_001.onnx",
        "onnx/layer_001.onnx",
        "onnx/layer_001.data",
        "onnx/monolith.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
        "validation.json",
    ],
)
@pytest.mark.parametrize(
    ("damage", "state"), [(miss, "missing"), (truncate, "truncated"), (alter, "altered")]
)
def test_damaged_file_is_named(
    read: Reader, bundle: Path, name: str, damage: Callable[[Path], None], state: str
) -> None:
    damage(bundle / name)
    before = snapshot(bundle)
    assert_one_line_error(read(bundle), str(bundle / name), state)
    assert snapshot(bundle) == before


@pytest.mark.parametrize("name", ["bundle.json", "bundle.sha256"])
@pytest.mark.parametrize("damage", [miss, truncate, alter])
def test_damaged_manifest_is_named(
    read: Reader, bundle: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(bundle / name)
    # a digest that does not fit says nothing about which of the two was altered
    named = name if damage is miss else "bundle."
    assert_one_line_error(read(bundle), str(bundle), named)


def test_manifest_with_one_number_changed_is_refused(read: Reader, bundle: Path) -> None:
    path = bundle / "bundle.json"
    path.write_text(path.read_text().replace('"max_cache_length": 64', '"max_cache_length": 65'))
    assert_one_line_error(read(bundle), str(path), "altered")


@pytest.mark.parametrize("changes", [{}, {"precision": "fp4", "adapters": ["lora"]}])
def test_newer_schema_is_called_newer(read: Reader, bundle: Path, changes: dict[str, Any]) -> None:
    rewrite_manifest(bundle, schema_version=3, **changes)
    assert_one_line_error(read(bundle), str(bundle / "bundle.json"), "schema 3", "newer", "update")


def test_older_schema_names_the_upgrade(read: Reader, bundle: Path) -> None:
    rewrite_manifest(bundle, schema_version=1)
    remedy = f"sedac-export upgrade {bundle}"
    assert_one_line_error(read(bundle), str(bundle / "bundle.json"), "schema 1", "older", remedy)


@pytest.mark.parametrize(
    "changes",
    [
        {"schema_version": "one"},
        {"engines": []},
        {"model": {"name": "x"}},
        {"exit_layers": "all"},
        {"target": "abacus"},
    ],
)
def test_manifest_of_other_types_is_refused(
    read: Reader, bundle: Path, changes: dict[str, Any]
) -> None:
    rewrite_manifest(bundle, **changes)
    assert_one_line_error(read(bundle), str(bundle / "bundle.json"))


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "{}"])
def test_manifest_that_is_none_is_refused(read: Reader, bundle: Path, text: str) -> None:
    (bundle / "bundle.json").write_text(text)
    assert_one_line_error(read(bundle), str(bundle / "bundle.json"))


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_path_that_is_no_bundle_is_refused(read: Reader, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert_one_line_error(read(tmp_path / name), str(tmp_path / name), "sedac-export build")


@pytest.fixture(params=["exit", "full", "inspect"])
def read_configuration(request: pytest.FixtureRequest, export: Command, runtime: Command) -> Reader:
    """A command that reads sedac_config.json, whether or not it needs it."""
    if request.param == "inspect":
        return lambda bundle: export("inspect", bundle)
    arguments = ["--prompt", "def f", "--mode", request.param, "--max-new-tokens", "2"]
    return lambda bundle: runtime("generate", "--engines", bundle, *arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tau", -0.1),
        ("tau", "high"),
        ("tau", None),
        ("consecutive_k", 0),
        ("consecutive_k", -1),
        ("consecutive_k", 1.5),
        ("min_layer_ratio", -0.1),
        ("min_layer_ratio", 1.5),
        ("policy", "luck"),
        ("kv_fill", "copy"),
        ("drafter", "auto"),
        ("drafter", "guess"),
        ("drafter", None),
        ("surprise", 1),
    ],
)
def test_exit_configuration_out_of_range_is_refused(
    read_configuration: Reader, bundle: Path, field: str, value: Any
) -> None:
    path = bundle / "sedac_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert_one_line_error(read_configuration(bundle), str(path))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"tau": NaN}', b'{"tau": 1e999}'])
def test_exit_configuration_that_is_none_is_refused(
    read_configuration: Reader, bundle: Path, data: bytes
) -> None:
    path = bundle / "sedac_config.json"
    path.write_bytes(data)
    assert_one_line_error(read_configuration(bundle), str(path))


def test_exit_configuration_of_more_layers_than_the_model_is_refused(
    runtime: Command, bundle: Path
) -> None:
    (bundle / "sedac_config.json").write_text('{"consecutive_k": 5}')
    result = runtime("generate", "--engines", bundle, "--prompt", "def f")
    assert_one_line_error(result, "consecutive_k 5", "1 to 4")


@pytest.mark.parametrize("depth", ["0", "5", "99"])
@pytest.mark.parametrize("policy", ["probe", "margin", "learned", "cascade"])
def test_thresholds_at_depths_that_the_model_lacks_are_refused(
    runtime: Command, bundle: Path, policy: str, depth: str
) -> None:
    at_depth = {depth: 0.5}
    others = {"weights": at_depth, "targets": at_depth} if policy == "cascade" else {}
    config = {"policy": policy, "thresholds": at_depth, **others}
    (bundle / "sedac_config.json").write_text(json.dumps(config))
    result = runtime("generate", "--engines", bundle, "--prompt", "def f")
    assert_one_line_error(result, f"thresholds at depth {depth} is out of range", "4 layers")


def test_exit_configuration_may_be_edited_within_its_ranges(
    export: Command, runtime: Command, bundle: Path
) -> None:
    (bundle / "sedac_config.json").write_text('{"tau": 0.0, "consecutive_k": 1}')
    facts = parse_only_json(export("inspect", bundle, "--json"))
    assert (facts["exit_config"]["tau"], facts["exit_config"]["consecutive_k"]) == (0.0, 1)
    arguments = ["--prompt", "def f", "--max-new-tokens", 3, "--mode", "exit", "--json"]
    generated = parse_only_json(runtime("generate", "--engines", bundle, *arguments))
    assert generated["exit_layers"][1:] == [1, 1]


def test_forced_build_replaces_a_damaged_bundle(
    export: Command, bundle: Path, long_bundle: Path
) -> None:
    alter(bundle / "bundle.json")
    model = shutil.copytree(long_bundle.parent / "model", bundle.parent / "model")
    result = export("build", "--model", model, "--output", bundle, "--force")
    assert result.code == 0, result
    parse_only_json(export("inspect", bundle, "--json"))
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "model"]


def test_a_bundle_above_the_default_tolerance_says_so(
    export: Command, runtime: Command, bundle: Path
) -> None:
    generate = ("generate", "--engines", bundle, "--prompt", "x", "--max-new-tokens", "2")
    assert "--atol" not in export("inspect", bundle).out + runtime(*generate).err
    rewrite_manifest(bundle, tolerance=1e-3, unread_tensors=["rotary_emb.inv_freq"])
    shown = " ".join(export("inspect", bundle).out.split())
    assert "--atol 0.001" in shown
    assert "rotary_emb.inv_freq" in shown
    assert "--atol 0.001" in parse_only_json(export("inspect", bundle, "--json"))["tolerance_note"]
    assert "--atol 0.001" in runtime(*generate).err
