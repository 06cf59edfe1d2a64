"""sedac-runtime refuses settings and prompts that it cannot use, and stops when told to."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bad_input.command import (
    Command,
    assert_one_line_error,
    parse_only_json,
    rewrite_file,
)
from bad_input.conftest import SHORT_CACHE
from sedac_runtime import InputError, SedacModel


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--tau", "-0.1"),
        ("--tau", "nan"),
        ("--tau", "inf"),
        ("--consecutive-k", "0"),
        ("--consecutive-k", "-1"),
        ("--consecutive-k", "5"),
        ("--consecutive-k", str(2**64)),
        ("--min-layer-ratio", "-0.1"),
        ("--min-layer-ratio", "1.1"),
        ("--min-layer-ratio", "nan"),
        ("--temperature", "-1"),
        ("--temperature", "inf"),
        ("--temperature", "nan"),
        ("--top-p", "0"),
        ("--top-p", "-0.5"),
        ("--top-p", "1.1"),
        ("--top-p", "nan"),
        ("--min-p", "-0.1"),
        ("--min-p", "1.1"),
        ("--min-p", "nan"),
        ("--top-k", "-1"),
        ("--top-k", str(2**64)),
        ("--repetition-penalty", "0"),
        ("--repetition-penalty", "inf"),
        ("--max-new-tokens", "0"),
        ("--max-new-tokens", "-1"),
        ("--max-new-tokens", str(2**64)),
        ("--seed", "-1"),
        ("--seed", str(2**64)),
        ("--threads", "0"),
        ("--threads", "-1"),
        ("--threads", "1000000"),
        ("--threads", str(2**64)),
    ],
)
@pytest.mark.parametrize("output", ["--json", "--stream", "--no-stream"])
def test_setting_out_of_range_is_refused(
    runtime: Command, bundle: Path, option: str, value: str, output: str
) -> None:
    result = runtime(
        *("generate", "--engines", bundle, "--prompt", "def f", "--mode", "exit"),
        *(option, value, output),
    )
    assert_one_line_error(result, option.removeprefix("--").replace("-", "_"), "out of range")


def test_drafts_between_exits_that_do_not_wait_are_refused(runtime: Command, bundle: Path) -> None:
    arguments = ["generate", "--engines", bundle, "--prompt", "def f", "--mode", "exit"]
    arguments += ["--drafter", "auto"]
    result = runtime(*arguments, "--kv-fill", "propagate")
    assert_one_line_error(result, "drafter auto", "kv_fill defer", "drafter none")
    assert runtime(*arguments, "--kv-fill", "defer", "--max-new-tokens", 2).code == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--forced-exit", "0"),
        ("--forced-exit", "-1"),
        ("--forced-exit", "5"),
        ("--forced-exit", "1,,2"),
        ("--forced-exit", "all"),
        ("--prompt-tokens", "0"),
        ("--prompt-tokens", "-1"),
        ("--prompt-tokens", "65"),
        ("--new-tokens", "1"),
        ("--new-tokens", "65"),
        ("--repeat", "0"),
        ("--threads", "0"),
    ],
)
@pytest.mark.parametrize("output", [[], ["--json"]], ids=["table", "json"])
def test_measurement_out_of_range_is_refused(
    runtime: Command, bundle: Path, option: str, value: str, output: list[str]
) -> None:
    small = {"--prompt-tokens": "2", "--new-tokens": "2", "--repeat": "1"} | {option: value}
    arguments = [text for pair in small.items() for text in pair]
    result = runtime("bench", "--engines", bundle, *arguments, *output)
    assert_one_line_error(result)


@pytest.mark.parametrize(
    "prompts", [[], ["--prompt", "a", "--prompt-file", "b"]], ids=["neither", "both"]
)
def test_prompt_given_not_once_is_refused(
    runtime: Command, bundle: Path, prompts: list[str]
) -> None:
    result = runtime("generate", "--engines", bundle, *prompts)
    assert_one_line_error(result, "either --prompt or --prompt-file")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("", ["--prompt", "empty"]), ("caf\udce9", ["--prompt", "UTF-8"])],
    ids=["empty", "not UTF-8"],
)
@pytest.mark.parametrize("chat", [[], ["--chat"]], ids=["text", "chat"])
def test_prompt_that_is_no_text_is_refused(
    runtime: Command, bundle: Path, prompt: str, words: list[str], chat: list[str]
) -> None:
    assert_one_line_error(
        runtime("generate", "--engines", bundle, "--prompt", prompt, *chat), *words
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"caf\xe9 au lait", ["prompt.txt", "UTF-8", "byte 3"]),
        (b"", ["prompt.txt", "empty"]),
        (None, ["prompt.txt", "No such file"]),
    ],
    ids=["not UTF-8", "empty", "missing"],
)
def test_prompt_file_that_is_no_text_is_refused(
    runtime: Command, bundle: Path, tmp_path: Path, data: bytes | None, words: list[str]
) -> None:
    file = tmp_path / "prompt.txt"
    if data is not None:
        file.write_bytes(data)
    assert_one_line_error(runtime("generate", "--engines", bundle, "--prompt-file", file), *words)


def test_directory_as_prompt_file_is_refused(
    runtime: Command, bundle: Path, tmp_path: Path
) -> None:
    result = runtime("generate", "--engines", bundle, "--prompt-file", tmp_path)
    assert_one_line_error(result, str(tmp_path), "Is a directory")


@pytest.mark.parametrize(("data", "word"), [(b"\xff", "UTF-8"), (b"", "empty")])
def test_standard_input_that_is_no_text_is_refused(
    runtime: Command, bundle: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, word: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert_one_line_error(runtime("generate", "--engines", bundle, "--prompt-file", "-"), word)


def prompt_of(bundle: Path, tokens: int) -> str:
    """A text of exactly so many tokens."""
    model = SedacModel.from_pretrained(bundle)
    text = " a" * tokens
    assert len(model.encode(text)) == tokens
    return text


def test_stop_string_that_is_no_text_is_refused(runtime: Command, bundle: Path) -> None:
    result = runtime("generate", "--engines", bundle, "--prompt", "x", "--stop", "a\udcff")
    assert_one_line_error(result, "--stop", "UTF-8")


def test_prompt_longer_than_the_cache_is_refused(runtime: Command, bundle: Path) -> None:
    prompt = prompt_of(bundle, SHORT_CACHE + 1)
    result = runtime("generate", "--engines", bundle, "--prompt", prompt)
    assert_one_line_error(result, "prompt of 65 tokens", "64 positions", "--max-cache-length")


@pytest.mark.parametrize("prompt_tokens", [3, SHORT_CACHE - 1, SHORT_CACHE])
@pytest.mark.parametrize("mode", ["full", "exit"])
def test_full_cache_ends_the_text(
    runtime: Command, bundle: Path, prompt_tokens: int, mode: str
) -> None:
    output = parse_only_json(
        runtime(
            *("generate", "--engines", bundle, "--prompt", prompt_of(bundle, prompt_tokens)),
            *("--mode", mode, "--max-new-tokens", 1000, "--repetition-penalty", 1.3, "--json"),
        )
    )
    assert output["finish_reason"] == "length"
    # the last token needs no place of its own
    assert len(output["tokens"]) == SHORT_CACHE - prompt_tokens + 1


def test_json_is_all_there_is(runtime: Command, bundle: Path) -> None:
    arguments = ["--engines", bundle, "--json"]
    generated = runtime("generate", *arguments, "--prompt", "def f", "--max-new-tokens", 4)
    assert len(parse_only_json(generated)["tokens"]) == 4
    assert generated.err == ""
    sizes = ["--prompt-tokens", 4, "--new-tokens", 4, "--repeat", 1]
    measured = runtime("bench", *arguments, *sizes, "--forced-exit", "1,4", "--against", "monolith")
    names = [row["name"] for row in parse_only_json(measured)["rows"]]
    assert names == ["chain", "exit@1", "exit@4", "monolith"]
    assert measured.err == ""


def test_inspection_as_json_is_all_there_is(export: Command, bundle: Path) -> None:
    result = export("inspect", bundle, "--json")
    assert parse_only_json(result)["model"]["num_layers"] == 4
    assert result.err == ""


def test_chat_without_a_template_is_refused(runtime: Command, bundle: Path) -> None:
    result = runtime("generate", "--engines", bundle, "--prompt", "hello", "--chat")
    assert_one_line_error(result, str(bundle), "chat template", "--chat")


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no users') }}", "{% for %}", "{{ messages.x.y }}"]
)
def test_chat_template_that_fails_is_named(
    runtime: Command, long_bundle: Path, tmp_path: Path, template: str
) -> None:
    bundle = shutil.copytree(long_bundle, tmp_path / "bundle")
    rewrite_file(bundle, "chat_template.jinja", template.encode())
    result = runtime("generate", "--engines", bundle, "--prompt", "hello", "--chat")
    assert_one_line_error(result, str(bundle), "chat template")


@pytest.mark.parametrize("chat", [[], ["--chat"]], ids=["text", "chat"])
def test_text_without_a_tokenizer_is_refused(
    runtime: Command, mute_bundle: Path, chat: list[str]
) -> None:
    result = runtime("generate", "--engines", mute_bundle, "--prompt", "hello", *chat)
    assert_one_line_error(result, "template" if chat else "tokenizer")


def test_python_refuses_what_the_command_refuses(mute_bundle: Path) -> None:
    model = SedacModel.from_pretrained(mute_bundle)
    for settings in (
        {"prompt": []},
        {"prompt": [-1]},
        {"prompt": [256]},
        {"prompt": [2**40]},
        {"prompt": "text"},
        {"prompt": [1], "stop_tokens": [-1]},
        {"prompt": [1], "forced_exit": [-1]},
        {"prompt": [1], "forced_exit": [5]},
        {"prompt": [1], "forced_exit": []},
        {"prompt": [1], "mode": "exit", "consecutive_k": -1},
        {"prompt": [1], "max_new_tokens": 0},
    ):
        with pytest.raises(InputError):
            model.generate(**settings)
    assert model.generate([1], max_new_tokens=2).finish_reason == "length"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["generate"],
        ["generate", "--no-such-option"],
        ["generate", "--engines", "e", "--prompt", "p", "--mode", "fast"],
        ["generate", "--engines", "e", "--prompt", "p", "--kv-fill", "copy"],
        ["generate", "--engines", "e", "--prompt", "p", "--tau", "high"],
        ["bench", "--engines", "e", "--against", "time"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_usage_error_exits_with_2(runtime: Command, arguments: list[str]) -> None:
    result = runtime(*arguments)
    assert result.code == 2
    assert "Traceback" not in result.err


# a shell's background jobs, CI's among them, start with Ctrl-C ignored
START = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from sedac_runtime.cli import main; main()"
)


def start_runtime(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", START, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=0
    )


def wait_until_loading(process: subprocess.Popen[str]) -> None:
    """Until Python has started and the command has come to its engines."""
    maps = Path(f"/proc/{process.pid}/maps")
    while "libonnxruntime" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)


def interrupt(process: subprocess.Popen[str]) -> str:
    """Press Ctrl-C; what the process had still to say on stderr."""
    process.send_signal(signal.SIGINT)
    # what was asked for takes longer than that by far
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert len(out) < 10_000
    return err


def test_interrupt_stops_a_generation(long_bundle: Path) -> None:
    process = start_runtime(
        *("generate", "--engines", long_bundle, "--prompt", "def f", "--mode", "full"),
        *("--max-new-tokens", 30_000, "--repetition-penalty", 1.3),
    )
    assert process.stdout is not None
    assert process.stdout.read(10)
    assert len(interrupt(process).splitlines()) <= 1


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_interrupt_stops_what_prints_at_the_end(long_bundle: Path, command: str) -> None:
    arguments = {
        "generate": ["--prompt", "def f", "--max-new-tokens", 30_000, "--repetition-penalty", 1.3],
        "bench": ["--new-tokens", 30_000, "--repeat", 1000],
    }
    process = start_runtime(command, "--engines", long_bundle, "--json", *arguments[command])
    wait_until_loading(process)
    assert len(interrupt(process).splitlines()) <= 1


def test_reader_that_leaves_early_gets_no_traceback(long_bundle: Path) -> None:
    with start_runtime(
        *("generate", "--engines", long_bundle, "--prompt", "def f", "--max-new-tokens", 30_000),
        *("--repetition-penalty", 1.3),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(30) == 1


def test_output_that_cannot_be_written_is_named(bundle: Path) -> None:
    command = [sys.executable, "-m", "sedac_runtime.cli", "generate", "--engines", str(bundle)]
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [*command, "--prompt", "x"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert run.returncode == 2
    assert "standard output cannot be written (No space left on device)" in run.stderr
    assert "Traceback" not in run.stderr


def test_output_of_a_text_is_its_json(runtime: Command, bundle: Path) -> None:
    arguments = ["generate", "--engines", bundle, "--prompt", "def f", "--max-new-tokens", 8]
    text = runtime(*arguments)
    assert text.code == 0
    assert text.out == json.loads(runtime(*arguments, "--json").out)["text"] + "\n"
