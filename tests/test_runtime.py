"""The runtime's Python side: streaming, stopping, sampling, chat, and what it imports."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from bad_input.command import rewrite_file
from conftest import THREADS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from sedac_runtime import InputError, SedacModel
from sedac_runtime.bench import bench
from sedac_runtime.choices import Drafter
from sedac_runtime.cli import app

PROMPT = "class Stack:\n    def push(self, item):\n"


def test_streamed_pieces_are_the_text(demo_model: SedacModel) -> None:
    # at this temperature tokens are nearly random bytes: characters begin, break off and finish
    unfinished = 0
    for seed in range(8):
        stream = demo_model.stream(
            PROMPT, temperature=3.0, seed=seed, max_new_tokens=60, stop_tokens=[]
        )
        pieces = [token.text for token in stream]
        assert len(stream.output.tokens) == len(pieces) == 60
        assert "".join(pieces) + stream.rest == stream.output.text
        assert demo_model.decode(stream.output.tokens) == stream.output.text
        unfinished += pieces.count("")
    # of characters whose other bytes come with later tokens
    assert unfinished > 0


# of the demo model, whose vocabulary has 4096
@given(st.lists(st.integers(0, 4095), max_size=40))
def test_the_pieces_of_any_tokens_are_their_text(demo_model: SedacModel, tokens: list[int]) -> None:
    stream = demo_model.core.text_stream()
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == demo_model.decode(tokens)


def test_a_character_comes_with_its_last_token(demo_model: SedacModel) -> None:
    stream = demo_model.core.text_stream()
    pieces = [stream.push(token) for token in demo_model.encode("a🙂b")]
    assert "🙂" in pieces and "" in pieces


def test_a_generation_that_failed_says_so_again(demo_model: SedacModel) -> None:
    stream = demo_model.stream(PROMPT, top_p=0.0)
    with pytest.raises(InputError, match="top_p"):
        _ = stream.output
    with pytest.raises(RuntimeError, match="did not finish"):
        _ = stream.output


def test_unknown_modes_are_refused(demo_model: SedacModel) -> None:
    with pytest.raises(InputError, match="mode exits is out of range"):
        demo_model.generate(PROMPT, mode="exits")
    with pytest.raises(InputError, match="kv_fill copy is out of range"):
        demo_model.generate(PROMPT, kv_fill="copy")
    with pytest.raises(InputError, match="drafter guess is out of range"):
        demo_model.generate(PROMPT, mode="lossless", drafter="guess")
    with pytest.raises(InputError, match="drafter none is out of range"):
        demo_model.generate(PROMPT, mode="lossless", drafter="none")
    with pytest.raises(InputError, match="none with kv_fill propagate; set kv_fill defer"):
        demo_model.generate(PROMPT, mode="exit", drafter="auto", kv_fill="propagate")
    for mode in ("full", "lossless"):
        with pytest.raises(InputError, match=f"tau belongs to mode exit, not to {mode}"):
            demo_model.generate(PROMPT, mode=mode, tau=0.9)
    for others in ({"mode": "full"}, {"forced_exit": [3]}):
        with pytest.raises(InputError, match="drafter belongs to mode lossless or exit"):
            demo_model.generate(PROMPT, drafter="auto", **others)  # type: ignore[arg-type]


@pytest.mark.parametrize("drafter", ["early-exit", "prompt-lookup", "auto"])
def test_with_drafts_tokens_are_full_depths_or_the_exits(
    demo_model: SedacModel, drafter: Drafter
) -> None:
    prompt = demo_model.encode(PROMPT)
    exits = {"tau": 0.985, "kv_fill": "defer"}
    # drafters learn, so each text is drafted otherwise
    drafted = early = deep = 0
    for _ in range(4):
        output = demo_model.generate(
            prompt, mode="exit", drafter=drafter, max_new_tokens=100, stop_tokens=[], **exits
        )
        assert (output.mode, output.drafter) == ("exit", drafter)
        text = prompt + output.tokens[:-1]
        full, exit_ = (demo_model.follow(text, **way) for way in ({"tau": 2.0}, exits))
        for n, (token, depth) in enumerate(zip(output.tokens, output.exit_layers, strict=True)):
            place = len(prompt) + n - 2
            if depth == 12:
                assert token == full[0][place]
            else:
                assert (token, depth) == (exit_[0][place], exit_[1][place])
        drafted += output.drafted
        early += sum(depth < 12 for depth in output.exit_layers)
        deep += sum(depth == 12 for depth in output.exit_layers[1:])
    assert min(drafted, early, deep) > 0


def test_exits_are_drafted_between_as_the_bundle_says(demo_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle")
    config = {"kv_fill": "defer", "drafter": "early-exit"}
    (bundle / "sedac_config.json").write_text(json.dumps(config))
    model = SedacModel.from_pretrained(bundle, threads=THREADS)
    exits = {"mode": "exit", "max_new_tokens": 32}
    assert model.generate(PROMPT, **exits).drafter == "early-exit"
    assert model.generate(PROMPT, max_new_tokens=2, mode="full").drafter == "none"
    assert model.generate(PROMPT, drafter="none", **exits).drafted == 0
    # the bundle's drafter goes with caches that it can use
    assert model.generate(PROMPT, kv_fill="propagate", **exits).drafter == "none"


def test_generation_stops_at_a_stop_token(demo_model: SedacModel) -> None:
    free = demo_model.generate(PROMPT, max_new_tokens=40, stop_tokens=[])
    assert free.finish_reason == "length"
    last = free.tokens[20]
    stopped = demo_model.generate(PROMPT, max_new_tokens=40, stop_tokens=[last])
    cut = free.tokens.index(last) + 1
    assert stopped.tokens == free.tokens[:cut]
    assert stopped.finish_reason == "stop"


def test_generation_stops_at_a_stop_string(demo_model: SedacModel) -> None:
    free = demo_model.generate(PROMPT, max_new_tokens=60, stop_tokens=[], mode="full")
    # a string across tokens, and one that never comes
    word = free.text[20:27]
    for mode in ("full", "lossless"):
        stopped = demo_model.generate(
            PROMPT, max_new_tokens=60, stop_tokens=[], mode=mode, stop_strings=["\0", word]
        )
        assert stopped.finish_reason == "stop"
        end = stopped.text.index(word) + len(word)
        assert free.text.startswith(stopped.text)
        # no token after the one that completed it
        last = demo_model.decode(stopped.tokens[:-1])
        assert len(last) < end <= len(stopped.text)
    with pytest.raises(InputError, match="stop_strings"):
        demo_model.generate(PROMPT, stop_strings=[""])


def test_a_plain_string_is_one_stop_string(demo_model: SedacModel) -> None:
    settings = {"mode": "full", "max_new_tokens": 60}
    listed = demo_model.generate("class Stack:\n", stop_strings=["self"], **settings)
    plain = demo_model.generate("class Stack:\n", stop_strings="self", **settings)
    assert plain.tokens == listed.tokens
    assert plain.finish_reason == "stop"


def test_what_is_no_text_or_token_is_refused(demo_model: SedacModel) -> None:
    with pytest.raises(InputError, match="surrogate"):
        demo_model.generate("x = '\ud800'")
    for take in (demo_model.generate, demo_model.follow, demo_model.decode):
        with pytest.raises(InputError, match="cannot be bytes"):
            take(b"def")
    with pytest.raises(InputError, match="token 5000"):
        demo_model.decode([1, 5000])
    for tokens in ([-1], ["a"], [2**40], [True]):
        with pytest.raises(InputError, match="token"):
            demo_model.generate(tokens)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="token"):
            demo_model.decode(tokens)  # type: ignore[arg-type]


def test_a_full_cache_ends_the_text(demo_model: SedacModel) -> None:
    prompt = [1] * 1020
    output = demo_model.generate(prompt, max_new_tokens=100, stop_tokens=[])
    # the last of them is chosen but never run
    assert len(output.tokens) == 1024 - 1020 + 1
    assert output.finish_reason == "length"


def test_the_output_counts_what_happened(demo_model: SedacModel) -> None:
    output = demo_model.generate(PROMPT, mode="exit", tau=0.97, max_new_tokens=32, stop_tokens=[])
    fields = asdict(output)
    assert list(fields) == [
        *("text", "tokens", "exit_layers", "num_layers", "mean_exit_layer", "exit_reasons"),
        *("mode", "kv_fill", "drafter", "prompt_tokens", "prefill_ms", "decode_ms"),
        *("decode_tokens_per_second", "finish_reason"),
        *("drafted", "accepted", "verify_passes", "draft_depths"),
        *("certificate", "certification"),
    ]
    assert len(output.tokens) == len(output.exit_layers) == len(output.exit_reasons) == 32
    assert output.exit_layers[0] == output.num_layers == 12
    assert output.prompt_tokens == len(demo_model.encode(PROMPT))
    for layer, reason in zip(output.exit_layers, output.exit_reasons, strict=True):
        assert reason == ("full_depth" if layer == 12 else "stability")


def test_a_seed_repeats_and_another_differs(demo_model: SedacModel) -> None:
    def draw(seed: int) -> list[int]:
        settings = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "max_new_tokens": 24}
        return demo_model.generate(PROMPT, seed=seed, stop_tokens=[], **settings).tokens

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    exits=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    prompt=st.lists(st.integers(1, 4095), min_size=1, max_size=20),
)
def test_exit_counters_follow_any_schedule(
    exits: list[int], prompt: list[int], demo_model: SedacModel
) -> None:
    output = demo_model.generate(prompt, forced_exit=exits, max_new_tokens=20, stop_tokens=[])
    expected = [12, *(exits[n % len(exits)] for n in range(19))]
    assert output.exit_layers == expected
    # what one generation leaves in the caches is invisible to the next
    again = demo_model.generate(prompt, forced_exit=exits, max_new_tokens=20, stop_tokens=[])
    assert again.tokens == output.tokens


def test_chat_renders_as_transformers_does(demo_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "chat"
    shutil.copytree(demo_bundle, bundle)
    template = (
        "{% for message in messages %}{{ bos_token }}{{ message.role }}: {{ message.content }}\n"
        "{% if tools is not none %}tools{% endif %}{% generation %}!{% endgeneration %}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {{ {'a': 'é'} | tojson }}{% endif %}"
    )
    rewrite_file(bundle, "chat_template.jinja", template.encode())
    messages = [{"role": "user", "content": "write a stack"}]
    expected = AutoTokenizer.from_pretrained(bundle).apply_chat_template(
        messages, add_generation_prompt=True
    )
    model = SedacModel.from_pretrained(bundle, threads=THREADS)
    assert model.encode_chat(messages) == expected["input_ids"]
    # as an edit of the bundle does, which puts another directory in its place
    shutil.rmtree(bundle)
    assert model.encode_chat(messages) == expected["input_ids"]


def test_bench_rows_are_named_and_sound(demo_bundle: Path) -> None:
    rows = bench(
        demo_bundle,
        forced_exit=[3, 12],
        drafters=["auto"],
        against="monolith",
        prompt_tokens=8,
        new_tokens=6,
        repeat=2,
        threads=THREADS,
    )
    names = ["chain", "exit@3", "exit@12", "lossless:auto", "monolith"]
    assert [row["name"] for row in rows] == names
    assert [row["mean_exit_layer"] for row in rows] == [12, 3, 12, 12, 12]
    assert [row["agreement"] for row in rows if row["name"] != "exit@3"] == [1.0] * 4
    for row in rows:
        # the median of two
        assert row["ms_per_token"] == pytest.approx((row["min_ms"] + row["max_ms"]) / 2)


def test_bench_compares_with_the_case_asked_for(demo_bundle: Path) -> None:
    settings = {"prompt_tokens": 8, "new_tokens": 6, "repeat": 1, "threads": THREADS}
    for against, name in (("monolith", "monolith"), ("full", "chain")):
        rows = bench(demo_bundle, forced_exit=[3, 12], against=against, **settings)
        milliseconds = {row["name"]: row["ms_per_token"] for row in rows}
        assert len(rows) > 2
        for row in rows:
            times = milliseconds[name] / row["ms_per_token"]
            assert row["speedup"] == pytest.approx(times)
            assert row["min_ms"] == row["max_ms"] == row["ms_per_token"] > 0


def test_bench_refuses_what_the_cache_would_cut_short(demo_bundle: Path) -> None:
    with pytest.raises(InputError, match="new_tokens 10 is out of range"):
        bench(demo_bundle, prompt_tokens=1020, new_tokens=10, threads=THREADS)


def test_the_runtime_needs_neither_torch_nor_transformers(demo_bundle: Path) -> None:
    code = (
        "import json, sys\n"
        "from sedac_runtime import SedacModel\n"
        "import sedac_runtime.cli\n"
        f"SedacModel.from_pretrained({str(demo_bundle)!r}).generate('x', max_new_tokens=2)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "onnx", "numpy", "sedac_export"}
    assert not heavy & set(json.loads(run.stdout))


def test_the_policy_may_come_from_the_environment(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["generate", "--engines", str(demo_bundle), "--prompt", PROMPT, "--json"]
    exits = [*arguments, "--mode", "exit", "--max-new-tokens", "16"]

    def run(method: str, **variables: str) -> Result:
        for name, value in {"SEDAC_METHOD": method, **variables}.items():
            monkeypatch.setenv(name, value)
        return CliRunner().invoke(app, exits)

    shallow = json.loads(run("v7", SEDAC_V7_TAU="0", SEDAC_V7_K="1").stdout)
    assert len(shallow["tokens"]) > 2
    assert shallow["exit_layers"][1:] == [3] * (len(shallow["tokens"]) - 1)
    assert shallow["certificate"] is None
    assert "SEDAC_METHOD v9 is unknown" in str(run("v9").exception)
    assert "policy margin has no thresholds" in str(
        CliRunner().invoke(app, [*exits, "--policy", "margin"]).exception
    )
    # the variables are about exits, which the default mode does not take
    lossless = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert lossless["mode"] == "lossless"
