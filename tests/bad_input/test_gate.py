"""Nothing outside of a bundle is opened, nothing unlisted, and no size is believed unchecked."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from conftest import THREADS
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bad_input.command import (
    Command,
    Result,
    assert_one_line_error,
    parse_only_json,
    rewrite_file,
    rewrite_manifest,
)
from sedac_runtime import SedacModel
from sedac_runtime._core import BenchCase, DecodingMode

Reader = Callable[[Path], Result]
LAYER = "onnx/layer_001.onnx"


@pytest.fixture(params=["generate", "inspect", "train-probes", "engines", "sign"])
def read(request: pytest.FixtureRequest, export: Command, runtime: Command) -> Reader:
    """A command that reads a bundle, or writes into one."""
    readers: dict[str, Reader] = {
        "generate": lambda bundle: runtime("generate", "--engines", bundle, "--prompt", "def f"),
        "inspect": lambda bundle: export("inspect", bundle),
        "train-probes": lambda bundle: export("train-probes", bundle, "--data", __file__),
        "engines": lambda bundle: export("engines", bundle, "--target", "tensorrt-rtx"),
        "sign": lambda bundle: export("sign", bundle, "--private-key", bundle.parent / "key"),
    }
    return readers[request.param]


@pytest.mark.parametrize("name", ["tokenizer.json", "onnx/layer_001.data", "sedac_config.json"])
def test_a_link_that_leads_out_is_refused(
    read: Reader, bundle: Path, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    shutil.move(bundle / name, outside)
    (bundle / name).symlink_to(outside)
    assert_one_line_error(read(bundle), str(bundle / name), "not a regular file inside")


def test_a_pipe_is_not_waited_for(read: Reader, bundle: Path) -> None:
    (bundle / LAYER).unlink()
    os.mkfifo(bundle / LAYER)
    assert_one_line_error(read(bundle), str(bundle / LAYER), "not a regular file inside")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "onnx/../../secret"])
def test_a_name_that_leads_out_is_refused(
    read: Reader, bundle: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "secret").write_text("secret")
    files = json.loads((bundle / "bundle.json").read_bytes())["files"]
    entry = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    rewrite_manifest(bundle, files=files | {name: entry})
    assert_one_line_error(read(bundle), name, "not a regular file inside")


@pytest.mark.parametrize("location", ["../../secret", "/dev/zero", "unlisted.data"])
def test_weights_elsewhere_are_refused(read: Reader, bundle: Path, location: str) -> None:
    (bundle / "onnx" / "unlisted.data").write_bytes(b"\0" * 65536)
    model = onnx.load(bundle / LAYER, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    rewrite_file(bundle, LAYER, model.SerializeToString())
    assert_one_line_error(read(bundle), str(bundle / LAYER), location, "does not list")


def test_engines_that_change_places_are_refused(read: Reader, bundle: Path) -> None:
    first, second = (bundle / "onnx/layer_000.onnx").read_bytes(), (bundle / LAYER).read_bytes()
    rewrite_file(bundle, "onnx/layer_000.onnx", second)
    rewrite_file(bundle, LAYER, first)
    assert_one_line_error(read(bundle), '"layer_001" where bundle.json means "layer_000"')


@pytest.mark.parametrize("length", [2**31 - 1, 2**34])
def test_a_cache_that_no_memory_holds_is_refused(
    runtime: Command, bundle: Path, length: int
) -> None:
    rewrite_manifest(bundle, max_cache_length=length)
    assert_one_line_error(runtime("generate", "--engines", bundle, "--prompt", "def f"))


def test_memory_has_a_limit(runtime: Command, bundle: Path) -> None:
    command = ("generate", "--engines", bundle, "--prompt", "def f", "--max-new-tokens", 2)
    refused = runtime(*command, "--memory-limit", "1M")
    assert_one_line_error(refused, str(bundle), "may take 1 MiB", "--max-cache-length")
    assert runtime(*command, "--memory-limit", "1G").code == 0
    for size in ("much", "-1", "1g", "1 G", ""):
        assert_one_line_error(runtime(*command, "--memory-limit", size), "--memory-limit")


def test_a_graph_that_no_memory_holds_is_not_read(runtime: Command, bundle: Path) -> None:
    graph = bundle / "onnx" / "z.onnx"
    graph.touch()
    os.truncate(graph, 1 << 28)
    files = json.loads((bundle / "bundle.json").read_bytes())["files"]
    digest = hashlib.sha256(graph.read_bytes()).hexdigest()
    entry = {"bytes": 1 << 28, "sha256": digest}
    rewrite_manifest(bundle, files=files | {"onnx/z.onnx": entry})
    command = ("generate", "--engines", bundle, "--prompt", "def f", "--memory-limit", "100M")
    assert_one_line_error(runtime(*command), "may take 100 MiB")


def test_a_graph_is_run_as_it_was_checked(bundle: Path) -> None:
    """Bytes 4 to 8 would make it a graph in ONNX Runtime's own format, a skipped field to ONNX."""
    expected = SedacModel.from_pretrained(bundle, threads=THREADS).generate(
        "def f", max_new_tokens=4
    )
    graph = (bundle / LAYER).read_bytes()
    rewrite_file(bundle, LAYER, b"\x08\x00\x09\x00ORTM\x00\x00\x00" + graph)
    model = SedacModel.from_pretrained(bundle, threads=THREADS)
    found = model.generate("def f", max_new_tokens=4)
    assert found.tokens == expected.tokens


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"engines": [{}], "end_to_end": 1}', "[" * 9999]
)
def test_inspect_refuses_a_validation_that_is_none(
    export: Command, bundle: Path, text: str
) -> None:
    rewrite_file(bundle, "validation.json", text.encode())
    assert_one_line_error(export("inspect", bundle), str(bundle / "validation.json"))


def test_a_signature_that_is_a_pipe_is_not_waited_for(
    export: Command, bundle: Path, tmp_path: Path
) -> None:
    os.mkfifo(bundle / "model.sig")
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "key").write_bytes(key.public_bytes(*form))
    result = export("verify", bundle, "--public-key", tmp_path / "key")
    assert_one_line_error(result, "model.sig", "not a regular file inside")


def test_a_chat_template_that_is_not_listed_is_not_read(runtime: Command, bundle: Path) -> None:
    (bundle / "chat_template.jinja").write_text("{{ messages[0].content }}")
    result = runtime("generate", "--engines", bundle, "--prompt", "def f", "--chat")
    assert_one_line_error(result, "no chat template")


def test_a_relative_bundle_survives_another_working_directory(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite_file(bundle, "chat_template.jinja", b"{{ messages[0].content }}")
    monkeypatch.chdir(bundle.parent)
    model = SedacModel.from_pretrained(bundle.name, threads=THREADS)
    monkeypatch.chdir("/")
    assert model.encode_chat([{"role": "user", "content": "def f"}]) == model.encode("def f")
    # the monolith is opened now
    full = DecodingMode.full()
    cases = [BenchCase("chain", full), BenchCase("monolith", full, monolith=True)]
    rows = model.measure(cases, [1, 2], prompt_tokens=2, new_tokens=2, repeat=1, against=1)
    assert rows[0]["agreement"] == 1.0


def test_what_changes_after_its_check_is_not_read(bundle: Path) -> None:
    rewrite_file(bundle, "chat_template.jinja", b"{{ messages[0].content }}")
    model = SedacModel.from_pretrained(bundle, threads=THREADS)
    (bundle / "chat_template.jinja").write_text("{{ 'something else' }}")
    assert model.encode_chat([{"role": "user", "content": "def f"}]) == model.encode("def f")


def test_inspect_says_what_it_hashed(
    export: Command, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    count = len(json.loads((bundle / "bundle.json").read_bytes())["files"])

    def files(*options: str) -> dict[str, int]:
        facts = parse_only_json(export("inspect", bundle, "--json", *options))
        return dict(facts["files"])

    assert files() == {"hashed": count, "unchanged": 0}
    assert files("--verify", "changed") == {"hashed": count, "unchanged": 0}
    assert files("--verify", "changed") == {"hashed": 0, "unchanged": count}
    (bundle / "validation.json").touch()
    assert files("--verify", "changed") == {"hashed": 1, "unchanged": count - 1}
    assert files() == {"hashed": count, "unchanged": 0}
    (bundle / "onnx/head.data").write_bytes(b"\0" * (bundle / "onnx/head.data").stat().st_size)
    result = export("inspect", bundle, "--verify", "changed")
    assert_one_line_error(result, str(bundle / "onnx/head.data"), "altered")
