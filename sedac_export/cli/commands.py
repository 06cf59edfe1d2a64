"""The command sedac-export."""

import json
import sys
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sedac_export.bundle.cuda_entry import PRECISIONS
from sedac_export.bundle.manifest import QuantizedWeights
from sedac_export.bundle.signature import SIGNATURE
from sedac_export.cli import advise_command, target_commands, validate_command
from sedac_export.cli import tensorrt_commands as tensorrt
from sedac_export.cli.drafter_commands import register_drafter_commands
from sedac_export.cli.exit_commands import DATA, register_exit_commands, spread_data
from sedac_export.cli.progress import progress_bar
from sedac_export.cli.quiet import silence_libraries
from sedac_export.cli.target_commands import ChosenTargets
from sedac_export.cli.targets import TargetName, Targets
from sedac_export.console import console
from sedac_export.errors import SedacError
from sedac_runtime.logs import configure
from sedac_runtime.terminal import visible
from sedac_runtime.tolerance import DEFAULT_TOLERANCE, tolerance_note

# the exit code after Ctrl-C
STOPPED = 130

app = typer.Typer(
    help="Build and inspect SEDAC bundles.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # rich's own markup would swallow [default: ...]
    pretty_exceptions_enable=False,
)
app.callback()(configure)

weights_option = partial(typer.Option, rich_help_panel="Weights")
engines_option = partial(typer.Option, rich_help_panel="Engines")


class PrecisionName(StrEnum):
    """What --precision takes."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


_QUANTIZED = (PrecisionName.INT8, PrecisionName.INT4)


class MethodName(StrEnum):
    """What --method takes."""

    RTN = "rtn"
    GPTQ = "gptq"


class VerifyName(StrEnum):
    """What --verify takes."""

    ALWAYS = "always"
    CHANGED = "changed"


@app.command()
def build(
    model: Annotated[
        str, typer.Option(help="A model directory, a .gguf file or a hub id (owner/name).")
    ],
    output: Annotated[Path, typer.Option(help="Bundle directory to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    precision: Annotated[
        PrecisionName,
        weights_option(help="Storage type of weights."),
    ] = PrecisionName.FP32,
    block_size: Annotated[
        int, weights_option(help="int8, int4: weights that share a scale: 16, 32, 64, 128 or 256.")
    ] = 32,
    symmetric: Annotated[
        bool,
        weights_option(
            "--symmetric/--asymmetric",
            help="int8, int4: blocks without a zero point, or with one each.",
        ),
    ] = True,
    method: Annotated[
        MethodName,
        weights_option(
            help="int8, int4: round to nearest, or calibrate the layers on --data by GPTQ."
        ),
    ] = MethodName.RTN,
    keep_precision: Annotated[
        str,
        weights_option(
            help="int8, int4: what stays in fp32: head, layers from 0, such as head,0,29."
        ),
    ] = "",
    data: Annotated[
        list[Path] | None,
        weights_option(
            DATA,
            help="int8, int4: UTF-8 texts to calibrate on and, others, to compare with the original"
            " on; takes several. [default: texts that ship with Python]",
        ),
    ] = None,
    layers_per_engine: Annotated[
        int,
        engines_option(
            help="Layers per engine; tokens exit between engines. Exits of more than one are not"
            " trained, calibrated or advised on."
        ),
    ] = 1,
    max_cache_length: Annotated[
        int | None,
        engines_option(help="Maximum sequence length. [default: the model's, at most 4096]"),
    ] = None,
    exit_layers: Annotated[
        str, engines_option(help="Depths at which tokens may exit: all, or a list such as 6,12,18.")
    ] = "all",
    atol: Annotated[
        float,
        engines_option(help="Maximum difference from the original, up to 1e-2."),
    ] = DEFAULT_TOLERANCE,
    target: Targets = [TargetName.ONNXRUNTIME],  # noqa: B006
    max_batch_size: tensorrt.MaxBatchSize = 1,
    max_prefill_chunk: tensorrt.MaxPrefillChunk = 512,
    compute_capabilities: tensorrt.ComputeCapabilities = "",
    version_compatible: tensorrt.VersionCompatible = False,
    hardware_compatible: tensorrt.HardwareCompatible = False,
) -> None:
    """Split a model into engines, validate them against the original, and write a bundle."""
    silence_libraries()
    from sedac_export.build.exporter import BuildRequest
    from sedac_export.build.exporter import build_bundle as run

    request = BuildRequest(
        model=model,
        output=output,
        precision=precision.value,
        block_size=block_size,
        symmetric=symmetric,
        method=method.value,
        keep_precision=keep_precision,
        data=data or (),
        layers_per_engine=layers_per_engine,
        max_cache_length=max_cache_length,
        exit_layers=_depths(exit_layers),
        tolerance=atol,
        force=force,
    )
    options = tensorrt.build_options(
        max_batch_size,
        max_prefill_chunk,
        compute_capabilities,
        version_compatible,
        hardware_compatible,
    )
    quantized = QuantizedWeights(
        block_size=block_size,
        symmetric=symmetric,
        method=method.value,
        kept_head=bool(keep_precision),
    )
    targets = ChosenTargets.check(
        target, options, precision.value, quantized if precision in _QUANTIZED else None
    )
    stages = ("trace", "write", "validate", *(("compare",) if precision in _QUANTIZED else ()))
    with progress_bar(*stages) as progress:
        built = run(request, progress)
    manifest, validation = built.manifest, built.validation
    size = sum(entry.bytes for entry in manifest.files.values())
    console.print(
        f"wrote {built.output}: {len(manifest.engines.layers)} layer engines of"
        f" {manifest.model.num_layers} layers, {size / 1e6:.1f} MB, {built.seconds:.1f} s\n"
        f"largest difference from the original {validation.worst().error:.1e}"
        f" ({validation.worst().engine}), allowed {validation.tolerance:.0e}\n"
        f"KV cache {manifest.cache_bytes() / 1e6:.1f} MB per sequence of"
        f" {manifest.max_cache_length} positions (--max-cache-length)",
        highlight=False,
    )
    if validation.quality is not None:
        console.print(_quality(asdict(validation.quality)), highlight=False, soft_wrap=True)
    for line in built.notes:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    note = tolerance_note(manifest.tolerance)
    if note is not None:
        console.print(f"warning: the bundle is {note}", highlight=False)
    if not manifest.tokenizer:
        console.print("the model has no tokenizer: the bundle generates from token ids only")
    try:
        targets.add(output, model, just_built=True)
    except SedacError as error:
        raise SedacError(f"{error}; {output} is whole for ONNX Runtime") from error


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    verify: Annotated[
        VerifyName,
        typer.Option(help="Hash every file, or only files changed since the last check."),
    ] = VerifyName.ALWAYS,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Show a bundle's model, engines, sizes, validation errors and exit configuration."""
    from sedac_export.build.inspection import inspect_bundle

    facts = inspect_bundle(bundle, verify.value)
    if as_json:
        print(json.dumps(facts))
        return
    # text of the bundle is shown literally: neither as markup nor as control characters
    out = Console(markup=False, emoji=False, highlight=False)
    facts = _visible(facts)
    model, validation = facts["model"], facts["validation"]
    exits = {name: value for name, value in facts["exit_config"].items() if name != "certificate"}
    out.print(
        f"{model['name']}: {model['type']}, {model['num_layers']} layers, hidden"
        f" {model['hidden_size']}, vocabulary {model['vocab_size']}\n"
        f"weights {facts['precision']}, {facts['bytes'] / 1e6:.1f} MB; KV cache"
        f" {facts['cache_bytes'] / 1e6:.1f} MB per sequence of {facts['max_cache_length']}\n"
        f"exits after layers {', '.join(map(str, facts['exit_layers']))}\n"
        f"{', '.join(f'{name} {value}' for name, value in exits.items())}\n"
        f"{facts['certification']}\n"
        f"end to end: error {validation['end_to_end']['error']:.1e}, cosine"
        f" {validation['end_to_end']['cosine']:.7f}, agreement"
        f" {validation['end_to_end']['agreement']:.3f}; allowed {facts['tolerance']:.0e}\n"
        f"{facts['files']['hashed']} files match their digests, {facts['files']['unchanged']}"
        " unchanged since they were last checked"
    )
    if facts["tolerance_note"] is not None:
        out.print(f"warning: {facts['tolerance_note']}")
    if facts["unread_tensors"]:
        names = ", ".join(facts["unread_tensors"])
        out.print(f"tensors of the checkpoint that no engine needs: {names}")
    if facts["quantization"] is not None:
        out.print(_quantization(facts["quantization"]), soft_wrap=True)
    quality = validation["quality"]
    if quality is not None:
        out.print(_quality(quality), soft_wrap=True)
    out.print(_cuda(facts), soft_wrap=True)
    if facts["onnxruntime_cuda"]:
        out.print("graphs for ONNX Runtime's CUDA provider")
    for flavour, version in facts["plans"].items():
        out.print(f"{flavour} engines of version {version}")
    if facts["drafter"] is not None:
        out.print(f"trained drafter of {facts['drafter']['tokens']} tokens")
    differences = {row["engine"]: row["difference"] for row in (quality or {}).get("engines", ())}
    table = Table("engine", "layers", "weights MB", "error", "cosine", "quantization error")
    for engine in facts["engines"]:
        table.add_row(
            engine["name"],
            engine["layers"],
            f"{engine['bytes'] / 1e6:.2f}",
            "" if engine["error"] is None else f"{engine['error']:.1e}",
            "" if engine["cosine"] is None else f"{engine['cosine']:.7f}",
            f"{differences[engine['name']]:.1e}" if engine["name"] in differences else "",
        )
    out.print(table)


@app.command()
def upgrade(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Write the upgraded bundle here instead of replacing the old one."),
    ] = None,
) -> None:
    """Upgrade a bundle to the current schema, without its model.

    The embed engine is split in two. Old and new engines are run with the same inputs and must give
    the same bits, so a certificate of the old engines carries over to the new ones. The exit
    configuration stays, a signature is removed, and TensorRT plans of the embed engine have to be
    built again.
    """
    from sedac_export.build.upgrade import upgrade_bundle

    upgraded = upgrade_bundle(bundle, output)
    console.print(f"{upgraded.output} is upgraded", highlight=False, soft_wrap=True)
    if upgraded.certified:
        console.print("the certificate was carried over: the engines give the same bits")
    for target, options in upgraded.incomplete.items():
        console.print(
            f"{target}: the plan of the embed engine was removed; build the two in its place with"
            f" sedac-export engines {upgraded.output} --target {target}"
            f"{tensorrt.flags(options)}",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def sign(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    private_key: Annotated[
        Path, typer.Option(help="PEM file with an unencrypted elliptic-curve private key.")
    ],
) -> None:
    """Sign a bundle, including its exit configuration and certificate."""
    from sedac_export.bundle.signing import sign_bundle

    sign_bundle(bundle, private_key)
    console.print(f"{bundle} is signed: {SIGNATURE}", highlight=False)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    public_key: Annotated[Path, typer.Option(help="PEM file with the signer's public key.")],
) -> None:
    """Check a bundle's files against its manifest and its signature."""
    from sedac_export.bundle.signing import verify_bundle

    verify_bundle(bundle, public_key)
    console.print(f"{bundle} is what the holder of {public_key} signed", highlight=False)


register_exit_commands(app)
register_drafter_commands(app)
target_commands.register(app)
validate_command.register(app)
advise_command.register(app)


def main() -> None:
    """Entry point: a user's mistake ends with one line on stderr and exit code 2."""
    try:
        app(args=spread_data(sys.argv[1:]))
    except (SedacError, OSError) as error:
        print(f"error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        # what typer makes of Ctrl-C
        if end.code == STOPPED:
            print("stopped", file=sys.stderr)
        raise


def _quantization(quantization: dict[str, Any]) -> str:
    """How the weights are quantized."""
    kind = "symmetric" if quantization["symmetric"] else "asymmetric"
    kept = [f"layer {layer}" for layer in quantization["kept_layers"]]
    kept += ["head"] if quantization["kept_head"] else []
    return (
        f"quantized by {quantization['method']}, {kind} blocks of {quantization['block_size']}"
        + (f"; fp32: {', '.join(kept)}" if kept else "")
    )


def _quality(quality: dict[str, Any]) -> str:
    """What quantization costs."""
    return (
        f"beside the original on {quality['tokens']} tokens of {quality['text']}: perplexity"
        f" {quality['perplexity']:.3f} (original {quality['original_perplexity']:.3f}), agreement"
        f" {100 * quality['agreement']:.1f} %, KL divergence {quality['divergence']:.4f}"
    )


def _cuda(facts: dict[str, Any]) -> str:
    """What there is for the target cuda, or why there is nothing."""
    chain, refusal = facts["cuda"], facts["cuda_refusal"]
    if chain is not None:
        architectures = ", ".join(module["architecture"] for module in chain["modules"])
        return f"CUDA chain for {architectures}, compiled by NVRTC {chain['compiler']}"
    if refusal is not None:
        return f"no CUDA chain: {refusal}"
    if facts["precision"] not in PRECISIONS:
        stored = facts["precision"]
        return f"no CUDA chain: it takes weights of 16 bits and less, and these are {stored}"
    if facts["quantization"] is not None:
        from sedac_export.cuda.weight_blocks import check_quantized

        try:
            check_quantized(QuantizedWeights(**facts["quantization"]))
        except SedacError as error:
            return f"no CUDA chain: {error}"
    return "no CUDA chain; sedac-export engines BUNDLE --target cuda --model MODEL adds it"


def _visible(facts: Any) -> Any:
    """Facts with every text on one line of characters that a terminal does not obey."""
    match facts:
        case str():
            return visible(facts).replace("\n", "\\n")
        case dict():
            return {_visible(name): _visible(value) for name, value in facts.items()}
        case list():
            return [_visible(value) for value in facts]
    return facts


def _depths(text: str) -> list[int] | None:
    if text == "all":
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise SedacError(
            f"--exit-layers {text} is neither all nor a list such as 6,12,18"
        ) from error
