"""model -> graphs -> bundle: the whole of `sedac-export build`."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from sedac_export.build.calibration import Calibration
from sedac_export.build.quality import measure_quality
from sedac_export.build.quantized_weights import KeptPrecision, choose_quantized
from sedac_export.build.texts import Texts, read_texts
from sedac_export.build.validate import BundleValidation, validate
from sedac_export.build.writer import EngineWriter, write_engines
from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.exit_config import ExitConfig
from sedac_export.bundle.staging import Claim, claimed
from sedac_export.console import StageProgress
from sedac_export.errors import SedacError
from sedac_export.graph.trace_model import TracedGraphs, check_attention, trace_graphs
from sedac_export.model.generation import generation_note, read_generation
from sedac_export.model.quantization import BITS, Method, Quantization
from sedac_export.model.skeleton import Skeleton
from sedac_export.model.source import ModelSource, opened_model
from sedac_export.model.support import check_stops
from sedac_export.model.tokenizer import load_tokenizer, save_tokenizer
from sedac_runtime.tolerance import DEFAULT_TOLERANCE

logger = logging.getLogger(__name__)

DEFAULT_CACHE_LENGTH = 4096
# engines that are further off than this compute something else
MOST_TOLERANCE = 1e-2


@dataclass(frozen=True)
class BuildRequest:
    """What to build. exit_layers None means all; max_cache_length None means the default cap.

    What follows the precision is for int8 and int4 only. keep_precision: layers, from 0, and
    "head". data: texts to calibrate on and, others, to compare with the original on; without them,
    some that ship with Python.
    """

    model: str
    output: Path
    precision: bundle.Precision = "fp32"
    block_size: int = 32
    symmetric: bool = True
    method: Method = "rtn"
    keep_precision: str = ""
    data: Sequence[Path] = ()
    layers_per_engine: int = 1
    max_cache_length: int | None = None
    exit_layers: list[int] | None = None
    tolerance: float = DEFAULT_TOLERANCE
    force: bool = False


@dataclass(frozen=True)
class BuiltBundle:
    """What a build wrote, how long it took in seconds, and what the user should know of it."""

    output: Path
    manifest: bundle.Manifest
    validation: BundleValidation
    seconds: float
    notes: Sequence[str] = ()


def build_bundle(request: BuildRequest, progress: StageProgress = lambda *_: None) -> BuiltBundle:
    """Build a bundle. It appears under its final name whole and validated, or not at all.

    progress is called with a stage's name, the steps done and their number.
    Raises SedacError for everything that is wrong with the request or the model.
    """
    started = time.monotonic()
    with claimed(request.output) as claim, torch.no_grad():
        _check_request(request)
        with opened_model(request.model, claim.scratch) as source:
            manifest, validation, note = _build(request, source, claim, progress)
            notes = (source.note, generation_note(source.directory), note)
    seconds = time.monotonic() - started
    said = [note for note in notes if note is not None]
    return BuiltBundle(request.output, manifest, validation, seconds, said)


def _build(
    request: BuildRequest, source: ModelSource, claim: Claim, progress: StageProgress
) -> tuple[bundle.Manifest, BundleValidation, str | None]:
    """What was written, and what the user should know of its weights."""
    skeleton = Skeleton.load(source.directory)
    tokenizer = source.tokenizer or load_tokenizer(source.directory)
    length = _cache_length(skeleton, request)
    exits = _exit_layers(skeleton, request)
    kept = KeptPrecision.parse(request.keep_precision, len(skeleton.layers))
    facts = _facts(source, skeleton, tokenizer)
    quantization, texts = _quantization(request), None
    if quantization is not None and tokenizer is not None:
        texts = read_texts(tokenizer, request.data, length)
    check_attention(skeleton, length)
    with claim.staging() as staging:
        logger.info(
            "tracing %s: %d layers, caches of %d positions", facts.name, facts.num_layers, length
        )
        graphs = trace_graphs(skeleton, progress)
        quantized, calibration = None, None
        if quantization is not None:
            quantized = choose_quantized(skeleton, graphs, quantization, kept)
            if quantization.method == "gptq":
                calibration = _calibration(skeleton, graphs, texts)
        precision = "fp32" if quantized else request.precision
        writer = EngineWriter(skeleton, staging, precision, quantized)
        manifest = bundle.Manifest(
            model=facts,
            max_cache_length=length,
            exit_layers=exits,
            tokenizer=tokenizer is not None,
            tolerance=request.tolerance,
            precision=request.precision,
            quantization=quantization and _entry(quantization, kept),
            **write_engines(
                writer, graphs, request.layers_per_engine, length, calibration, progress
            ),
        )
        progress("validate", 0, 1)
        validation = validate(skeleton, staging, manifest, request.tolerance, writer.rounded)
        logger.info("largest difference from the original %.1e", validation.worst().error)
        validation.check()
        progress("validate", 1, 1)
        if texts is not None:
            quality = measure_quality(skeleton, staging, manifest, texts, progress)
            validation = replace(validation, quality=quality)
        manifest = _finish(staging, manifest, validation, tokenizer)
        claim.publish(staging, replace=request.force)
    return manifest, validation, writer.faint_note()


def _quantization(request: BuildRequest) -> Quantization | None:
    """How the weights are quantized, None where they are not."""
    bits = BITS.get(request.precision)
    if bits is None:
        return None
    return Quantization(bits, request.block_size, request.symmetric, request.method)


def _calibration(skeleton: Skeleton, graphs: TracedGraphs, texts: Texts | None) -> Calibration:
    if texts is None:
        raise SedacError(
            f"--method gptq calibrates on text, and {skeleton.directory} has no tokenizer; build"
            " with --method rtn"
        )
    return Calibration(skeleton, texts.calibration, graphs.interface.heads)


def _entry(quantization: Quantization, kept: KeptPrecision) -> bundle.QuantizedWeights:
    return bundle.QuantizedWeights(
        block_size=quantization.block_size,
        symmetric=quantization.symmetric,
        method=quantization.method,
        kept_layers=sorted(kept.layers),
        kept_head=kept.head,
    )


def _check_request(request: BuildRequest) -> None:
    output = request.output
    quantization = _quantization(request)
    if quantization is not None:
        quantization.check()
    else:
        _check_unquantized(request)
    if not 0 <= request.tolerance <= MOST_TOLERANCE:
        raise SedacError(f"--atol {request.tolerance} is out of range: 0 to {MOST_TOLERANCE}")
    if output.exists() and not request.force:
        raise SedacError(f"{output} exists; choose another --output or replace it with --force")
    if output.exists() and not (output / bundle.MANIFEST).exists():
        raise SedacError(
            f"{output} is not a bundle, so --force does not replace it; remove it first"
        )


def _check_unquantized(request: BuildRequest) -> None:
    options = {
        "--block-size": request.block_size != BuildRequest.block_size,
        "--asymmetric": not request.symmetric,
        "--method": request.method != BuildRequest.method,
        "--keep-precision": bool(request.keep_precision),
        "--data": bool(request.data),
    }
    for option, is_set in options.items():
        if is_set:
            raise SedacError(
                f"{option} is for --precision int8 and int4, and this is {request.precision}; leave"
                " it out or choose one of these"
            )


def _cache_length(skeleton: Skeleton, request: BuildRequest) -> int:
    limit = skeleton.max_positions()
    length = request.max_cache_length
    if length is None:
        return min(limit or DEFAULT_CACHE_LENGTH, DEFAULT_CACHE_LENGTH)
    if length < 1:
        raise SedacError(f"--max-cache-length {length} is out of range: 1 or more")
    if limit is not None and length > limit:
        raise SedacError(
            f"--max-cache-length {length} is outside 1..{limit}, the positions this model is"
            " defined for"
        )
    return length


def _exit_layers(skeleton: Skeleton, request: BuildRequest) -> list[int]:
    """Depths at which a token may stop: all ends of engines, or the requested ones among them."""
    count, step = len(skeleton.layers), request.layers_per_engine
    if not 1 <= step <= count:
        raise SedacError(f"--layers-per-engine {step} is outside 1..{count}, this model's layers")
    ends = sorted({*range(step, count, step), count})
    if request.exit_layers is None:
        return ends
    wrong = sorted(set(request.exit_layers) - set(ends))
    if wrong:
        raise SedacError(
            f"--exit-layers {wrong[0]} is not the end of an engine; with {step} layers per engine"
            f" tokens can exit after {', '.join(map(str, ends))}"
        )
    return sorted({*request.exit_layers, count})


def _facts(
    source: ModelSource, skeleton: Skeleton, tokenizer: PreTrainedTokenizerBase | None
) -> bundle.ModelFacts:
    config = skeleton.config
    generation = read_generation(source.directory) or skeleton.model.generation_config
    stops = getattr(generation, "eos_token_id", None)
    if stops is None:
        stops = getattr(config, "eos_token_id", None)
    if stops is None and tokenizer is not None:
        stops = tokenizer.eos_token_id
    stops = [] if stops is None else list(stops) if isinstance(stops, list | tuple) else [stops]
    check_stops(stops, config.vocab_size, source.directory)
    return bundle.ModelFacts(
        name=source.name,
        type=config.model_type,
        hidden_size=config.hidden_size,
        num_layers=len(skeleton.layers),
        vocab_size=config.vocab_size,
        eos_token_ids=stops,
    )


def _finish(
    staging: Path,
    manifest: bundle.Manifest,
    validation: BundleValidation,
    tokenizer: PreTrainedTokenizerBase | None,
) -> bundle.Manifest:
    """Write everything but the engines, the manifest last."""
    if tokenizer is not None:
        save_tokenizer(tokenizer, staging)
    (staging / bundle.VALIDATION).write_text(json.dumps(asdict(validation), indent=1) + "\n")
    (staging / bundle.EXIT_CONFIG).write_text(
        ExitConfig.for_layers(manifest.model.num_layers).to_json()
    )
    whole = manifest.model_copy(update={"files": bundle.list_files(staging)})
    bundle.write_manifest(staging, whole)
    return whole
