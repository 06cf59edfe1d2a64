"""sedac-export build refuses what it cannot use, and a failed build leaves everything as it was."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bad_input.command import (
    Command,
    assert_one_line_error,
    mounted_tmpfs,
    snapshot,
)

Damage = Callable[[Path], object]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def configure(**changes: Any) -> Damage:
    def damage(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def write(name: str, text: str) -> Damage:
    return lambda model: (model / name).write_text(text)


def remove(name: str) -> Damage:
    return lambda model: (model / name).unlink()


def cut(name: str, size: int) -> Damage:
    return lambda model: os.truncate(model / name, size)


def change_weights(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(model: Path) -> None:
        weights = load_file(model / WEIGHTS)
        change(weights)
        save_file(weights, model / WEIGHTS)

    return damage


def index(text: str) -> Damage:
    """An index `text`, and no file that goes before it."""

    def damage(model: Path) -> None:
        (model / WEIGHTS).rename(model / "model-00001-of-00001.safetensors")
        (model / INDEX).write_text(text)

    return damage


def name_missing_shard(model: Path) -> None:
    (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / INDEX).write_text(json.dumps({"weight_map": shards}))


DAMAGED_MODELS: dict[str, tuple[Damage, list[str]]] = {
    "unknown type": (configure(model_type="nonesuch"), ["config.json", "nonesuch"]),
    "no type": (write("config.json", "{}"), ["config.json", "model_type"]),
    "encoder-decoder": (write("config.json", '{"model_type": "t5"}'), ["t5", "encoder"]),
    "no language model": (write("config.json", '{"model_type": "vit"}'), ["vit", "decoders"]),
    "code of its own": (
        configure(model_type="own", auto_map={"AutoConfig": "own.Config"}),
        ["config.json", "custom code"],
    ),
    "code beside a known type": (
        configure(auto_map={"AutoModelForCausalLM": "own.Model"}),
        ["config.json", "custom code", "auto_map", "llama"],
    ),
    "an adapter beside it": (
        write("adapter_config.json", '{"peft_type": "LORA"}'),
        ["adapter_config.json", "merge it into the model first"],
    ),
    "quantized": (configure(quantization_config={"quant_method": "fp8"}), ["quantized"]),
    "config no JSON": (write("config.json", '{"model_type":'), ["config.json", "JSON"]),
    "config of wrong type": (configure(hidden_size="big"), ["config.json", "hidden_size"]),
    "config contradicts": (configure(hidden_size=63), ["config.json", "63"]),
    "unknown activation": (configure(hidden_act="weird"), ["config.json", "weird"]),
    "unknown rope": (configure(rope_parameters={"rope_type": "odd"}), ["config.json", "odd"]),
    "no config": (remove("config.json"), ["config.json"]),
    "no weights": (remove(WEIGHTS), [WEIGHTS]),
    "missing weight": (change_weights(lambda w: w.pop(WEIGHT)), [WEIGHT]),
    "missing layer": (configure(num_hidden_layers=5), ["model.layers.4"]),
    "wrong shape": (
        change_weights(lambda w: w.update({WEIGHT: w[WEIGHT][1:].contiguous()})),
        [WEIGHT, "[95, 64]", "[96, 64]"],
    ),
    "shape of another config": (configure(vocab_size=100), ["embed_tokens", "[100, 64]"]),
    "scale of a quantizer": (
        change_weights(lambda w: w.update({f"{WEIGHT}_scale": w[WEIGHT][:1].clone()})),
        [f"{WEIGHT}_scale", "no place", "quantize"],
    ),
    "numbers of a quantizer": (
        change_weights(lambda w: w.update({WEIGHT: w[WEIGHT].to(torch.int8)})),
        [WEIGHT, "I8", "quantize"],
    ),
    "bare and prefixed": (
        change_weights(lambda w: w.update({WEIGHT.removeprefix("model."): w[WEIGHT].clone()})),
        [WEIGHT, "twice"],
    ),
    "cut in the tensors": (cut(WEIGHTS, 300_000), [WEIGHTS, "whole"]),
    "cut in the header": (cut(WEIGHTS, 20), [WEIGHTS, "whole"]),
    "empty weights": (cut(WEIGHTS, 0), [WEIGHTS, "whole"]),
    "missing shard": (name_missing_shard, ["model-00002-of-00002.safetensors", INDEX]),
    "index no JSON": (index("{"), [INDEX]),
    "index no map": (index("[]"), [INDEX]),
    "index of numbers": (index('{"weight_map": {"a": 1}}'), ["1", INDEX]),
    "tokenizer no JSON": (write("tokenizer.json", '{"version":'), ["tokenizer"]),
    "tokenizer empty": (write("tokenizer.json", "{}"), ["tokenizer"]),
    "negative end of text": (
        write("generation_config.json", '{"eos_token_id": [2, -1]}'),
        ["eos_token_id -1", "generation_config.json"],
    ),
    "end of text beyond the vocabulary": (
        write("generation_config.json", '{"eos_token_id": 256}'),
        ["eos_token_id 256", "256 tokens"],
    ),
    "end of text that is true": (
        write("generation_config.json", '{"eos_token_id": true}'),
        ["eos_token_id True", "generation_config.json"],
    ),
    "generation config no JSON": (write("generation_config.json", "{"), ["generation_config.json"]),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGED_MODELS.values(), ids=DAMAGED_MODELS.keys())
def test_damaged_model_is_refused(
    export: Command, model: Path, damage: Damage, words: list[str]
) -> None:
    damage(model)
    before = snapshot(model.parent)
    result = export("build", "--model", model, "--output", model.parent / "new" / "bundle")
    assert_one_line_error(result, *words)
    assert snapshot(model.parent) == before


@pytest.mark.parametrize(
    "name", ["nowhere", "no/such/model", "/no/such/model", "./nowhere", "../nowhere", __file__]
)
def test_neither_directory_nor_hub_id_is_refused(
    export: Command, tmp_path: Path, name: str
) -> None:
    result = export("build", "--model", name, "--output", tmp_path / "bundle")
    assert_one_line_error(result, name, "neither", "hub id")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sedac/no-such-model", "sedac/not a name"])
def test_model_that_the_hub_does_not_give_is_refused(
    export: Command, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = export("build", "--model", name, "--output", tmp_path / "bundle")
    assert_one_line_error(result, name, "hub")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--exit-layers", "0"], ["--exit-layers 0"]),
        (["--exit-layers", "5"], ["--exit-layers 5", "1, 2, 3, 4"]),
        (["--exit-layers", "-1"], ["--exit-layers -1"]),
        (["--exit-layers", "1,,2"], ["--exit-layers 1,,2"]),
        (["--exit-layers", "some"], ["--exit-layers some"]),
        (["--exit-layers", ""], ["--exit-layers"]),
        (["--exit-layers", "1", "--layers-per-engine", "2"], ["--exit-layers 1", "2, 4"]),
        (["--layers-per-engine", "0"], ["--layers-per-engine 0", "1..4"]),
        (["--layers-per-engine", "-1"], ["--layers-per-engine -1", "1..4"]),
        (["--layers-per-engine", "5"], ["--layers-per-engine 5", "1..4"]),
        (["--max-cache-length", "0"], ["--max-cache-length 0"]),
        (["--max-cache-length", "-1"], ["--max-cache-length -1"]),
        (["--max-cache-length", "321"], ["--max-cache-length 321", "1..320"]),
        (["--atol", "-1"], ["--atol -1"]),
        (["--atol", "nan"], ["--atol nan"]),
        (["--atol", "inf"], ["--atol inf"]),
        (["--atol", "0.011"], ["--atol 0.011", "0.01"]),
    ],
    ids=lambda texts: " ".join(texts) if texts[0].startswith("--") and len(texts) > 1 else "",
)
def test_option_out_of_range_is_refused(
    export: Command, model: Path, options: list[str], words: list[str]
) -> None:
    before = snapshot(model.parent)
    result = export("build", "--model", model, "--output", model.parent / "bundle", *options)
    assert_one_line_error(result, *words)
    assert snapshot(model.parent) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["build"],
        ["build", "--no-such-option"],
        ["build", "--model", "m", "--output", "o", "--precision", "fp8"],
        ["build", "--model", "m", "--output", "o", "--layers-per-engine", "two"],
        ["inspect"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_usage_error_exits_with_2(export: Command, arguments: list[str]) -> None:
    result = export(*arguments)
    assert result.code == 2
    assert "Traceback" not in result.err


def a_bundle(output: Path, bundle: Path) -> None:
    shutil.copytree(bundle, output)


def a_directory(output: Path, bundle: Path) -> None:
    output.mkdir()
    (output / "thesis.txt").write_text("irreplaceable")


def an_empty_directory(output: Path, bundle: Path) -> None:
    output.mkdir()


def a_file(output: Path, bundle: Path) -> None:
    output.write_text("irreplaceable")


@pytest.mark.parametrize(
    ("occupy", "options", "words"),
    [
        (a_bundle, [], ["exists", "--force"]),
        (a_directory, [], ["exists", "--force"]),
        (an_empty_directory, [], ["exists", "--force"]),
        (a_file, [], ["exists", "--force"]),
        (a_directory, ["--force"], ["not a bundle"]),
        (an_empty_directory, ["--force"], ["not a bundle"]),
        (a_file, ["--force"], ["not a bundle"]),
    ],
)
def test_what_is_at_the_output_stays(
    export: Command,
    model: Path,
    mute_bundle: Path,
    occupy: Callable[[Path, Path], None],
    options: list[str],
    words: list[str],
) -> None:
    output = model.parent / "output"
    occupy(output, mute_bundle)
    before = snapshot(model.parent)
    result = export("build", "--model", model, "--output", output, *options)
    assert_one_line_error(result, str(output), *words)
    assert snapshot(model.parent) == before


@pytest.mark.parametrize("below", ["bundle", "deeper/bundle"])
def test_output_below_a_file_is_refused(export: Command, model: Path, below: str) -> None:
    (model.parent / "file").touch()
    before = snapshot(model.parent)
    output = model.parent / "file" / below
    result = export("build", "--model", model, "--output", output)
    assert_one_line_error(result, str(output), "cannot be written", "file", "parent")
    assert snapshot(model.parent) == before


def test_output_on_a_read_only_disk_is_refused(export: Command, model: Path) -> None:
    with mounted_tmpfs(model.parent / "disk", "ro") as disk:
        result = export("build", "--model", model, "--output", disk / "bundle")
        assert_one_line_error(result, str(disk / "bundle"), "Read-only file system")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("/proc/bundle", "No such file or directory"),
        ("/tmp/" + 250 * "n", "File name too long"),
        ("/tmp/" + 300 * "n", "File name too long"),
        ("/tmp/" + 300 * "n" + "/bundle", "File name too long"),
    ],
    ids=["no disk", "long with its ending", "long", "long parent"],
)
def test_output_that_no_file_can_have_is_refused(
    export: Command, model: Path, output: str, reason: str
) -> None:
    result = export("build", "--model", model, "--output", output)
    assert_one_line_error(result, f"{output} cannot be written: {reason}; nothing was kept")


@pytest.mark.parametrize("full_at", ["weights", "tokenizer"])
def test_full_disk_keeps_the_old_bundle_and_nothing_else(
    export: Command, long_bundle: Path, tmp_path: Path, full_at: str
) -> None:
    files = [path for path in long_bundle.rglob("*") if path.is_file()]
    blocks = sum(-(-path.stat().st_size // 4096) for path in files)
    graphs = sum(-(-path.stat().st_size // 4096) for path in long_bundle.glob("onnx/*"))
    # a bundle, and next to it room for some weights, or for all engines but not the tokenizer
    room = blocks + (100 if full_at == "weights" else graphs + 20)
    length = json.loads((long_bundle / "bundle.json").read_text())["max_cache_length"]
    with mounted_tmpfs(tmp_path / "disk", f"size={room * 4}k") as disk:
        shutil.copytree(long_bundle, disk / "bundle")
        before = snapshot(disk)
        result = export(
            *("build", "--model", long_bundle.parent / "model"),
            *("--output", disk / "bundle", "--force", "--max-cache-length", length),
        )
        words = ["the tokenizer"] if full_at == "tokenizer" else []
        assert_one_line_error(result, str(disk / "bundle"), "No space left on device", *words)
        assert snapshot(disk) == before


def test_build_over_tolerance_names_the_engine_and_keeps_nothing(
    export: Command, model: Path
) -> None:
    before = snapshot(model.parent)
    output = model.parent / "new" / "bundle"
    result = export("build", "--model", model, "--output", output, "--atol", "0")
    assert_one_line_error(result, "engine layer_000", "tolerance", "--atol")
    assert snapshot(model.parent) == before


def test_forced_build_over_tolerance_keeps_the_old_bundle(
    export: Command, model: Path, mute_bundle: Path
) -> None:
    output = shutil.copytree(mute_bundle, model.parent / "bundle")
    before = snapshot(model.parent)
    result = export("build", "--model", model, "--output", output, "--atol", "1e-12", "--force")
    assert_one_line_error(result, "engine layer_000", "tolerance", "--atol")
    assert snapshot(model.parent) == before


def test_failed_rename_puts_the_old_bundle_back(
    export: Command, model: Path, mute_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(mute_bundle, model.parent / "bundle")
    before = snapshot(model.parent)
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if Path(target) == output and not self.name.endswith(".replaced"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    result = export("build", "--model", model, "--output", output, "--force")
    assert_one_line_error(result, str(output), "Input/output error")
    assert snapshot(model.parent) == before


def test_a_link_is_built_where_it_points_to(
    export: Command, model: Path, mute_bundle: Path
) -> None:
    output = shutil.copytree(mute_bundle, model.parent / "disk" / "bundle")
    (output / "mark").touch()
    link = model.parent / "link"
    link.symlink_to(output)
    assert_one_line_error(export("build", "--model", model, "--output", link), "link exists")
    assert export("build", "--model", model, "--output", link, "--force").code == 0
    assert link.readlink() == output
    assert not (output / "mark").exists()
    assert [path.name for path in output.parent.iterdir()] == ["bundle"]
