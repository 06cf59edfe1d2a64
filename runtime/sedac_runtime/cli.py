"""The command sedac-runtime."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar, get_args

import typer
from rich.console import Console

from sedac_runtime import SedacError, SedacModel
from sedac_runtime.bench import Reference
from sedac_runtime.bench import bench as run_bench
from sedac_runtime.bench_table import markdown_table, print_rows
from sedac_runtime.choices import LosslessDrafter as LosslessDrafterName
from sedac_runtime.choices import PolicyName
from sedac_runtime.engine_options import (
    BackendName,
    BackendOption,
    DeviceName,
    DeviceOption,
    MemoryOption,
    ThreadsOption,
    Verify,
    VerifyOption,
    parse_bytes,
)
from sedac_runtime.logs import configure
from sedac_runtime.model import GenerationStream
from sedac_runtime.peer_comparison import bench_peers
from sedac_runtime.peer_models import PEERS, parse_peer_models, parse_peers
from sedac_runtime.serve.serve_command import serve
from sedac_runtime.terminal import visible
from sedac_runtime.text_file import replace_text
from sedac_runtime.tolerance import tolerance_note

app = typer.Typer(
    help="Run SEDAC bundles: per-layer engines with speculative decoding and early exit.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # rich's own markup would swallow [default: ...]
    pretty_exceptions_enable=False,
)
app.callback()(configure)
console = Console(stderr=True)

Number = TypeVar("Number", int, float)
REFERENCES: dict[str, Reference] = {name: name for name in get_args(Reference)}
METHODS: dict[str, PolicyName] = {"v6": "probe", "v6.1": "cascade", "v7": "stability"}

input_option = partial(typer.Option, rich_help_panel="Input")
mode_option = partial(typer.Option, rich_help_panel="Mode and exits")
sampling_option = partial(typer.Option, rich_help_panel="Sampling")
output_option = partial(typer.Option, rich_help_panel="Output")

EnginesOption = Annotated[Path, input_option("--engines", help="Directory of the bundle.")]
JsonOption = Annotated[bool, output_option("--json", help="Print the result as one JSON object.")]


class GenerationMode(StrEnum):
    """What --mode takes."""

    FULL = "full"
    EXIT = "exit"
    LOSSLESS = "lossless"


class KvFill(StrEnum):
    """What --kv-fill takes."""

    PROPAGATE = "propagate"
    DEFER = "defer"


class Policy(StrEnum):
    """What --policy takes."""

    STABILITY = "stability"
    PROBE = "probe"
    CASCADE = "cascade"
    MARGIN = "margin"
    LEARNED = "learned"


class Drafter(StrEnum):
    """What --drafter takes."""

    NONE = "none"
    AUTO = "auto"
    EARLY_EXIT = "early-exit"
    PROMPT_LOOKUP = "prompt-lookup"
    TRAINED = "trained"


class LosslessDrafter(StrEnum):
    """What bench's --drafter takes."""

    AUTO = "auto"
    EARLY_EXIT = "early-exit"
    PROMPT_LOOKUP = "prompt-lookup"
    TRAINED = "trained"


@app.command()
def generate(
    engines: EnginesOption,
    prompt: Annotated[str | None, input_option(help="Text to continue.")] = None,
    prompt_file: Annotated[
        str | None, input_option(help="UTF-8 file with the prompt; - for stdin.")
    ] = None,
    chat: Annotated[
        bool,
        input_option("--chat", help="Render the prompt as a user message with the chat template."),
    ] = False,
    mode: Annotated[
        GenerationMode,
        mode_option(
            help="full runs every layer; lossless gives the same tokens by speculative decoding;"
            " exit stops tokens early and may change them."
        ),
    ] = GenerationMode.LOSSLESS,
    policy: Annotated[
        Policy | None, mode_option(help="Exit policy, with --mode exit. [default: the bundle's]")
    ] = None,
    threshold: Annotated[
        float | None,
        mode_option(help="Threshold at every depth; not for stability. [default: the bundle's]"),
    ] = None,
    tau: Annotated[
        float | None,
        mode_option(help="Minimum stability of a stable layer. [default: the bundle's]"),
    ] = None,
    consecutive_k: Annotated[
        int | None, mode_option(help="Consecutive stable layers to exit. [default: the bundle's]")
    ] = None,
    min_layer_ratio: Annotated[
        float | None,
        mode_option(help="Share of the layers that always run. [default: the bundle's]"),
    ] = None,
    kv_fill: Annotated[
        KvFill | None,
        mode_option(
            help="KV backfill of skipped layers: projected from the exit's hidden state, or"
            " deferred and exact."
            " [default: the bundle's]"
        ),
    ] = None,
    drafter: Annotated[
        Drafter | None,
        mode_option(
            help="Proposes tokens that full depth verifies; with --mode exit, those that do not"
            " exit. [default: auto with --mode lossless, else the bundle's]"
        ),
    ] = None,
    temperature: Annotated[float, sampling_option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_k: Annotated[
        int, sampling_option(help="Sample from the k most probable tokens; 0 for all.")
    ] = 0,
    top_p: Annotated[
        float,
        sampling_option(help="Sample from the smallest set of tokens with this total probability."),
    ] = 1.0,
    min_p: Annotated[
        float, sampling_option(help="Minimum probability, relative to the most probable token.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, sampling_option(help="Penalty for tokens already in the text; 1 for none.")
    ] = 1.0,
    seed: Annotated[int, sampling_option(help="Sampling seed.")] = 0,
    max_new_tokens: Annotated[
        int, output_option(help="Maximum number of tokens to generate.")
    ] = 128,
    stop: Annotated[
        list[str] | None,
        output_option(help="Stop after this text; repeatable."),
    ] = None,
    threads: ThreadsOption = None,
    backend: BackendOption = BackendName.ONNXRUNTIME,
    device: DeviceOption = None,
    verify: VerifyOption = Verify.ALWAYS,
    memory_limit: MemoryOption = None,
    stream: Annotated[bool, output_option(help="Print the text while it is generated.")] = True,
    profile: Annotated[
        Path | None,
        output_option(help="Write a Chrome trace of every step and engine to this file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt."""
    text = _read_prompt(prompt, prompt_file)
    _check_profile(profile)
    for string in stop or ():
        _check_text("--stop", string)
    model = SedacModel.from_pretrained(
        engines,
        threads=threads,
        backend=backend.value,
        device=None if device is None else device.value,
        verify=verify.value,
        memory_limit=parse_bytes(memory_limit),
    )
    _print_tolerance(model)
    tokens = model.encode_chat([{"role": "user", "content": text}]) if chat else model.encode(text)
    chosen: PolicyName | None = None if policy is None else policy.value
    if mode is GenerationMode.EXIT:  # the variables configure exits
        chosen = chosen or _method()
        if threshold is None:  # which is no setting of stability
            tau = _variable("SEDAC_V7_TAU", float, chosen) if tau is None else tau
            if consecutive_k is None:
                consecutive_k = _variable("SEDAC_V7_K", int, chosen)
    generation = model.stream(
        tokens,
        max_new_tokens=max_new_tokens,
        mode=mode.value,
        policy=chosen,
        threshold=threshold,
        tau=tau,
        consecutive_k=consecutive_k,
        min_layer_ratio=min_layer_ratio,
        kv_fill=None if kv_fill is None else kv_fill.value,
        drafter=None if drafter is None else drafter.value,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_strings=stop or (),
        profile=profile is not None,
    )
    if as_json:
        print(json.dumps(asdict(generation.output)))
    else:
        _print_text(generation, stream)
    if profile is not None:
        replace_text(profile, generation.profile or "")


def _print_text(generation: GenerationStream, stream: bool) -> None:
    if stream:
        for token in generation:
            _write(token.text)
        _write(generation.rest + "\n")
    else:
        _write(generation.output.text + "\n")
    _print_statistics(generation)


@app.command()
def bench(
    engines: EnginesOption,
    forced_exit: Annotated[
        str | None, typer.Option(help="Depths at which to exit every token, such as 6,12,24.")
    ] = None,
    drafter: Annotated[
        list[LosslessDrafter] | None,
        typer.Option(help="Also measure lossless mode with this drafter; repeatable."),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            help="Baseline: full for the chain at full depth, monolith for a single engine of all"
            f" layers, or other runtimes on the CPU: {','.join(PEERS)}."
        ),
    ] = "full",
    peer_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Where a runtime of --against has the model from: a checkpoint's directory, for"
            " llama.cpp a GGUF file; repeatable. [default: the hub's, if the bundle is of there]",
        ),
    ] = None,
    prompt_file: Annotated[
        str | None, input_option(help="UTF-8 file with the prompt. [default: arbitrary tokens]")
    ] = None,
    prompt_tokens: Annotated[int, input_option(help="Length of the prompt, in tokens.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode per repetition.")] = 128,
    repeat: Annotated[int, typer.Option(help="Timed repetitions of each row.")] = 5,
    threads: ThreadsOption = None,
    backend: BackendOption = BackendName.ONNXRUNTIME,
    device: DeviceOption = None,
    verify: VerifyOption = Verify.ALWAYS,
    memory_limit: MemoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure time per token, the variants interleaved."""
    depths = _depths(forced_exit)
    drafters: list[LosslessDrafterName] = [choice.value for choice in drafter or ()]
    prompt = None if prompt_file is None else _read_prompt(None, prompt_file)
    limit = parse_bytes(memory_limit)
    models = parse_peer_models(peer_model or ())
    reference = REFERENCES.get(against)
    if reference is not None:
        if models:
            raise ValueError(f"--peer-model is for other runtimes, not for --against {against}")
        rows = run_bench(
            engines,
            forced_exit=depths,
            drafters=drafters,
            against=reference,
            prompt=prompt,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeat=repeat,
            threads=threads,
            backend=backend.value,
            device=None if device is None else device.value,
            verify=verify.value,
            memory_limit=limit,
        )
        if as_json:
            print(json.dumps({"rows": rows}))
        else:
            print_rows(rows)
        return
    peers = parse_peers(against)
    if backend is not BackendName.ONNXRUNTIME or device is DeviceName.CUDA:
        raise ValueError("--against other runtimes measures on the CPU; leave --backend out")
    peer_rows = bench_peers(
        engines,
        peers,
        peer_models=models,
        forced_exit=depths,
        drafters=drafters,
        prompts=[] if prompt is None else [prompt],
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeat=repeat,
        threads=threads,
        verify=verify.value,
        memory_limit=limit,
    )
    print(json.dumps({"rows": peer_rows}) if as_json else markdown_table(peer_rows))


app.command()(serve)


def main() -> None:
    """Entry point: a user's mistake ends with one line on stderr and exit code 2."""
    try:
        app()
    except (SedacError, OSError, ValueError) as error:
        _fail(error)
    except KeyboardInterrupt:
        console.print("stopped", style="yellow")
        sys.exit(130)


def _fail(error: Exception) -> NoReturn:
    if isinstance(error, BrokenPipeError):
        # the reader has gone; python would complain again when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    message = " ".join(str(error).split())
    print(f"error: {visible(message)}", file=sys.stderr)
    sys.exit(2)


def _check_profile(path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"--profile {path} is a directory; name a file in it")
    if not path.absolute().parent.is_dir():
        raise ValueError(
            f"--profile {path}: its directory does not exist; create {path.parent} first"
        )


def _check_text(source: str, text: str) -> None:
    try:
        text.encode("utf-8")  # an argument's stray bytes arrive as surrogates
    except UnicodeEncodeError as error:
        raise ValueError(f"{source} is not UTF-8 (byte {error.start}); convert it first") from error


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give either --prompt or --prompt-file")
    source = "--prompt" if prompt_file is None else f"prompt file {prompt_file}"
    try:
        text = _read_file(prompt_file) if prompt is None else prompt
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 (byte {error.start}); convert it first") from error
    except OSError as error:
        raise ValueError(f"{source} cannot be read ({error.strerror}); give a text file") from error
    _check_text(source, text)
    if not text:
        raise ValueError(f"{source} is empty; give some text to continue")
    return text


def _read_file(name: str | None) -> str:
    assert name is not None
    if name == "-":
        return sys.stdin.buffer.read().decode("utf-8")
    return Path(name).read_text(encoding="utf-8")


def _depths(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--forced-exit {text} is not a list of depths such as 6,12,24") from error


def _write(text: str) -> None:
    try:
        sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"standard output cannot be written ({error.strerror})") from error


def _print_tolerance(model: SedacModel) -> None:
    note = tolerance_note(model.tolerance)
    if note is not None:
        print(f"warning: {model.bundle} was {note}", file=sys.stderr)


def _print_statistics(generation: GenerationStream) -> None:
    output = generation.output
    drafts = f" {output.accepted} of {output.drafted} drafts accepted," if output.drafted else ""
    print(
        f"{len(output.tokens)} tokens, {output.decode_tokens_per_second:.1f} tokens/s,"
        f" mean exit layer {output.mean_exit_layer:.1f} of {output.num_layers},{drafts}"
        f" prefill {output.prefill_ms:.0f} ms, finished by {output.finish_reason}",
        file=sys.stderr,
    )
    if output.certification is not None:
        kind = "warning: " if output.certificate is None else ""
        print(f"{kind}{output.certification}", file=sys.stderr)


def _method() -> PolicyName | None:
    """The policy that the original SEDAC's variable names; None where it is not set."""
    method = os.environ.get("SEDAC_METHOD")
    if method is not None and method.lower() not in METHODS:
        raise ValueError(f"SEDAC_METHOD {method} is unknown: {', '.join(METHODS)}")
    return None if method is None else METHODS[method.lower()]


def _variable(name: str, kind: Callable[[str], Number], policy: PolicyName | None) -> Number | None:
    """One of the original's variables about stability; None where that is not what decides."""
    text = os.environ.get(name)
    if text is None or policy not in (None, "stability"):
        return None
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{name} {text} is not a number; correct or unset it") from error


if __name__ == "__main__":
    main()
