"""SEDAC beside other runtimes: what is measured, what is left out, and what is refused."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
from bad_input.command import Command, assert_one_line_error, call, parse_only_json
from conftest import DEMO_MODEL, THREADS

import sedac_runtime.cli
from sedac_runtime import EngineError, InputError, bench_peers
from sedac_runtime.bench_table import markdown_table
from sedac_runtime.peer_comparison import PeerRow
from sedac_runtime.peer_models import PEERS, PeerName, installed_peers

PROMPT = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n"
SMALL: dict[str, Any] = {"prompt_tokens": 8, "new_tokens": 6, "repeat": 1, "threads": THREADS}


@pytest.fixture
def runtime(capfd: pytest.CaptureFixture[str]) -> Command:
    return lambda *arguments: call(sedac_runtime.cli.main, list(map(str, arguments)), capfd)


def install(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """From now on these modules are installed, as far as anybody asks, and no others."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in modules else None)


@pytest.mark.slow
def test_rows_are_measured_and_judged(demo_bundle: Path) -> None:
    """The bundle stores the checkpoint's own fp16 weights, so both choose the same tokens."""
    rows = bench_peers(
        demo_bundle,
        ["transformers"],
        peer_models={"transformers": str(DEMO_MODEL)},
        forced_exit=[3],
        drafters=["auto"],
        prompts=[PROMPT, [5, 6, 7]],
        **SMALL,
    )
    assert [row["name"] for row in rows] == ["chain", "exit@3", "lossless:auto", "transformers"]
    by_name = {row["name"]: row for row in rows}
    shallow = by_name.pop("exit@3")
    assert shallow["agreement"] < 1
    assert shallow["original_agreement"] == shallow["agreement"]
    for row in by_name.values():
        assert (row["agreement"], row["original_agreement"]) == (1, 1)
    assert by_name["transformers"]["speedup"] == {"transformers": 1}
    chain, other = by_name["chain"], by_name["transformers"]
    ratio = chain["tokens_per_second"] / other["tokens_per_second"]
    assert chain["speedup"]["transformers"] == pytest.approx(ratio)
    ratio = other["prefill_ms"] / chain["prefill_ms"]
    assert chain["prefill_speedup"]["transformers"] == pytest.approx(ratio)
    for row in rows:
        assert row["load_ms"] > row["prefill_ms"] > 0
        assert row["resident_bytes"] > 20e6


@pytest.mark.slow
def test_onnxruntime_genai_gives_the_same_tokens(demo_bundle: Path) -> None:
    """Its builder makes the model in fp32, in which SEDAC computes."""
    pytest.importorskip("onnxruntime_genai")
    models: dict[PeerName, str] = {"onnxruntime-genai": str(DEMO_MODEL)}
    rows = bench_peers(
        demo_bundle, ["onnxruntime-genai"], peer_models=models, prompts=[PROMPT], **SMALL
    )
    assert [(row["name"], row["agreement"]) for row in rows] == [
        ("chain", 1),
        ("onnxruntime-genai", 1),
    ]


@pytest.mark.slow
def test_llama_cpp_gives_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from gguf_files import save_tiny_gguf_model, write_gguf

    from sedac_export import BuildRequest, build_bundle

    file = write_gguf(save_tiny_gguf_model("llama", tmp_path / "model"), tmp_path / "tiny.gguf")
    build_bundle(BuildRequest(str(file), tmp_path / "bundle"))
    rows = bench_peers(
        tmp_path / "bundle", ["llama.cpp"], peer_models={"llama.cpp": str(file)}, **SMALL
    )
    # the model is random: its most likely tokens are hardly more likely than others
    assert rows[1]["name"] == "llama.cpp"
    assert rows[1]["agreement"] > 0.5


@pytest.mark.slow
def test_a_runtime_that_fails_is_named(demo_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"transformers fails with {tmp_path}: .*config.json"):
        bench_peers(
            demo_bundle, ["transformers"], peer_models={"transformers": str(tmp_path)}, **SMALL
        )


def test_what_is_not_installed_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, "llama_cpp", "transformers")  # the latter without torch
    with caplog.at_level(logging.WARNING):
        assert installed_peers(PEERS) == ["llama.cpp"]
    assert caplog.messages == [
        "left out, not installed: onnxruntime-genai, transformers;"
        " pip install onnxruntime-genai transformers torch"
    ]
    install(monkeypatch)
    with pytest.raises(InputError, match=r"llama\.cpp.* not installed; pip install llama-cpp"):
        installed_peers(["llama.cpp"])
    with pytest.raises(
        InputError, match=r"runtime 'vllm' is none of onnxruntime-genai, llama\.cpp"
    ):
        installed_peers(["vllm"])  # type: ignore[list-item]


def test_a_model_may_be_given_for_what_is_not_installed(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command runs wherever some of its runtimes are: here it goes on to the other's."""
    install(monkeypatch, "llama_cpp")
    models: dict[PeerName, str] = {"transformers": str(DEMO_MODEL)}
    with pytest.raises(InputError, match=r"llama\.cpp has no model"):
        bench_peers(demo_bundle, ["llama.cpp", "transformers"], peer_models=models, **SMALL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--against", "vllm"], ["--against vllm", "onnxruntime-genai", "llama.cpp"]),
        (["--against", "llama.cpp,"], ["--against", "neither full, monolith nor"]),
        (["--against", "llama.cpp"], ["llama.cpp has no model", "--peer-model llama.cpp=PATH"]),
        (
            ["--against", "llama.cpp", "--peer-model", "llama.cpp=no.gguf"],
            ["llama.cpp has no model at no.gguf"],
        ),
        (["--against", "transformers"], ["transformers has no model", "a hub id"]),
        (["--against", "llama.cpp", "--peer-model", "x"], ["--peer-model x", "NAME=PATH"]),
        (["--against", "llama.cpp", "--peer-model", "vllm=x"], ["--peer-model vllm=x"]),
        (["--against", "llama.cpp", "--peer-model", "transformers=x"], ["not compared with"]),
        (["--peer-model", "llama.cpp=x"], ["--peer-model", "--against full"]),
        (["--against", "llama.cpp", "--backend", "cuda"], ["on the CPU", "--backend"]),
        (["--against", "llama.cpp", "--repeat", "0"], ["repeat 0 is out of range"]),
    ],
)
def test_comparisons_that_cannot_be_are_refused(
    arguments: list[str],
    words: list[str],
    runtime: Command,
    demo_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, "llama_cpp", "transformers", "torch")
    assert_one_line_error(runtime("bench", "--engines", demo_bundle, *arguments), *words)


@pytest.fixture
def rows() -> list[PeerRow]:
    row = PeerRow(
        name="chain",
        version="0.1",
        prefill_ms=12.4,
        tokens_per_second=80.04,
        min_tokens_per_second=70,
        max_tokens_per_second=90,
        speedup={"llama.cpp": 1.254},
        prefill_speedup={"llama.cpp": 1},
        agreement=1,
        original_agreement=None,
        load_ms=345,
        resident_bytes=200_000_000,
    )
    return [row, {**row, "name": "llama.cpp", "agreement": 0.985}]


def test_the_table_is_markdown(rows: list[PeerRow]) -> None:
    header, rule, first, second = markdown_table(rows).splitlines()
    assert header == (
        "| runtime | first token, ms | tokens/s | min | max | over llama.cpp | agreement |"
        " loaded, s | resident, MB |"
    )
    assert rule == "|" + " --- |" * 9
    assert first == "| chain 0.1 | 12 | 80.0 | 70.0 | 90.0 | 1.25x | 100.0% | 0.34 | 200 |"
    assert "| 98.5% |" in second
    judged: list[PeerRow] = [{**row, "original_agreement": 0.5} for row in rows]
    assert "| 100.0% | 50.0% |" in markdown_table(judged)


def test_the_command_prints_what_was_measured(
    runtime: Command, rows: list[PeerRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def measure(bundle: Path, peers: list[PeerName], **settings: Any) -> list[PeerRow]:
        asked.update(settings, peers=peers)
        return rows

    monkeypatch.setattr(sedac_runtime.cli, "bench_peers", measure)
    arguments = ["bench", "--engines", "e", "--against", "llama.cpp,transformers"]
    arguments += ["--peer-model", "llama.cpp=m.gguf", "--drafter", "auto"]
    assert runtime(*arguments).out == markdown_table(rows) + "\n"
    assert parse_only_json(runtime(*arguments, "--json")) == {"rows": rows}
    assert asked["peers"] == ["llama.cpp", "transformers"]
    assert asked["peer_models"] == {"llama.cpp": "m.gguf"}
    assert asked["drafters"] == ["auto"]
    assert asked["prompts"] == []
