"""Add the target cuda to a bundle: the chain's kernel, compiled, and its weights."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from sedac_export.bundle import Bundle
from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.agreement_row import failures
from sedac_export.bundle.cuda_entry import (
    PRECISIONS,
    ChainLayer,
    ChainModule,
    ChainOptions,
    ChainShape,
    CudaChain,
)
from sedac_export.bundle.staging import Claim, claimed, sync
from sedac_export.console import StageProgress
from sedac_export.cuda.compiler import Compiler, chain_macros, fingerprint
from sedac_export.cuda.description import ChainDescription, describe
from sedac_export.cuda.identification import NoChainError
from sedac_export.cuda.packing import write_weights
from sedac_export.cuda.recomputed_chain import agreement
from sedac_export.cuda.weight_blocks import WeightBlocks, check_quantized, weight_blocks
from sedac_export.device_graphs.same_model import (
    check_facts,
    engine_settings,
    other_model,
    other_settings,
)
from sedac_export.errors import SedacError
from sedac_export.graph.trace_model import check_attention
from sedac_export.model.skeleton import Skeleton
from sedac_export.model.source import opened_model

PLACE = "engines/cuda"
WEIGHTS = f"{PLACE}/weights.safetensors"


def check_cuda(precision: bundle.Precision, quantized: bundle.QuantizedWeights | None) -> Compiler:
    """The compiler. Raises SedacError when it is not installed, or for other weights."""
    if precision not in PRECISIONS:
        raise SedacError(
            f"--target cuda takes weights of 16 bits and less, and these are {precision}; build"
            " with --precision fp16"
        )
    if quantized is not None:
        check_quantized(quantized)
    return Compiler()


def add_cuda(
    directory: Path,
    model: str | None = None,
    progress: StageProgress = lambda *_: None,
    just_built: bool = False,
) -> CudaChain:
    """Compile the chain for the bundle in `directory` and lay its weights out.

    model is needed where the bundle has no chain yet: a directory, a GGUF file or a hub id, of
    which the structure is used; the weights are those of the bundle. Without it the kernel is
    compiled anew and the weights kept. just_built: the bundle was built from it just now. Raises
    SedacError, also when the kernel cannot run the model: the manifest says why from then on.
    """
    with claimed(directory) as claim:
        bundle.settle_manifest(directory)
        # what is wrong with the target's own files is put right by making them anew
        opened = Bundle.open(directory, replaced=PLACE if model else None)
        compiler = check_cuda(opened.manifest.precision, opened.manifest.quantization)
        if model is None:
            description, chain = None, _held(opened)
        else:
            description = _describe(opened, model, claim)
            chain = _Chain.of(description, opened.manifest)
        with claim.scratch() as scratch:
            weights = scratch / Path(WEIGHTS).name
            entry = chain.compile(compiler, scratch, progress)
            if description is None:
                os.link(opened.path(WEIGHTS), weights)
            else:
                write_weights(weights, opened, description, progress)
                if not just_built:
                    _check_same(opened, model or "", entry, weights)
            _enter(opened, scratch, entry)
    return entry


@dataclass(frozen=True)
class _Chain:
    """What the kernel is compiled for.

    vectors: names of the layers' norms and biases; blocks: how matrices lie.
    """

    shape: ChainShape
    options: ChainOptions
    layers: list[ChainLayer]
    vectors: list[str]
    blocks: WeightBlocks

    @classmethod
    def of(cls, description: ChainDescription, manifest: bundle.Manifest) -> "_Chain":
        shape = description.shape
        blocks = weight_blocks(manifest, shape)
        vectors = description.vectors()
        return cls(shape, description.options, description.layers, vectors, blocks)

    def compile(self, compiler: Compiler, scratch: Path, progress: StageProgress) -> CudaChain:
        """Write the compiled files into `scratch`; the manifest's entry of them."""
        tables = 1 + max(layer.rotary for layer in self.layers)
        macros = chain_macros(self.shape, self.options, tables, self.vectors, self.blocks)
        modules = []
        for compiled in compiler.compile(macros, progress):
            (scratch / compiled.file).write_bytes(compiled.code)
            modules.append(
                ChainModule(
                    file=f"{PLACE}/{compiled.file}",
                    architecture=compiled.architecture,
                    kernels=compiled.kernels,
                )
            )
        return CudaChain(
            compiler=compiler.version,
            fingerprint=fingerprint(macros),
            shape=self.shape,
            options=self.options,
            layers=self.layers,
            modules=modules,
            weights=WEIGHTS,
            block_bytes=self.blocks.block_bytes,
        )


def _held(opened: Bundle) -> _Chain:
    """The chain that the bundle has."""
    held = opened.manifest.cuda
    if held is None:
        raise SedacError(
            f"{opened.directory} does not say how its layers are made; name the model with --model"
        )
    with safe_open(opened.path(held.weights), "np") as weights:
        prefix = "layers.0."
        vectors = [n.removeprefix(prefix) for n in weights.keys() if n.startswith(prefix)]  # noqa: SIM118
    blocks = weight_blocks(opened.manifest, held.shape)
    return _Chain(held.shape, held.options, held.layers, vectors, blocks)


def _describe(opened: Bundle, model: str, claim: Claim) -> ChainDescription:
    manifest = opened.manifest
    with opened_model(model, claim.scratch) as source, torch.no_grad():
        skeleton = Skeleton.load(source.directory)
        check_facts(opened.directory, manifest.model, model, skeleton)
        # the prompt that describes a model is shorter than most windows; masks show those
        check_attention(skeleton, manifest.max_cache_length)
        try:
            return describe(skeleton)
        except NoChainError as error:
            if manifest.cuda is not None:
                reason = f"the kernel runs the bundle's, and not this one ({error})"
                raise other_model(opened.directory, model, reason) from error
            _withdraw(opened, str(error))
            raise SedacError(
                f"{opened.directory}: the cuda target cannot run this model: {error}; leave the"
                " target out"
            ) from error


def _check_same(opened: Bundle, model: str, chain: CudaChain, weights: Path) -> None:
    """Raise SedacError when `chain`, described by `model`, is not the bundle's own engines'."""
    reason = _other_settings(opened, chain) or next(
        iter(failures(agreement(opened, chain, weights))), None
    )
    if reason is not None:
        raise other_model(opened.directory, model, reason)


def _other_settings(opened: Bundle, chain: CudaChain) -> str | None:
    """Where the chain is not made as engines say that they are: few rows might not show it."""
    for engine in opened.manifest.engines.layers:
        own = chain.layers[engine.first_layer :][: engine.num_layers]
        made = {layer.window for layer in own}, {float(np.float32(chain.options.norm_epsilon))}
        reason = other_settings(engine, made, engine_settings(opened.path(engine.file)))
        if reason is not None:
            return reason
    return None


def _enter(opened: Bundle, scratch: Path, entry: CudaChain) -> None:
    """Make `scratch` the target's directory, and its files the bundle's."""
    place = opened.directory / PLACE
    place.parent.mkdir(exist_ok=True)
    if place.parent.resolve() != opened.directory.resolve() / "engines" or place.is_symlink():
        raise SedacError(f"{place} leads out of the bundle; remove the link there")
    rest = _withdraw(opened, None)
    if place.exists():
        shutil.rmtree(place)
    for path in (*scratch.iterdir(), scratch):
        sync(path)
    scratch.rename(place)
    sync(place.parent)
    names = [entry.weights, *(module.file for module in entry.modules)]
    files = rest.files | {name: bundle.file_entry(opened.directory, name) for name in names}
    whole = rest.model_copy(update={"cuda": entry, "files": files})
    bundle.write_manifest(opened.directory, whole)


def _withdraw(opened: Bundle, refusal: str | None) -> bundle.Manifest:
    """Take the target out of the manifest, which never names a file that is being replaced."""
    manifest = opened.manifest
    kept = {name: e for name, e in manifest.files.items() if not name.startswith(f"{PLACE}/")}
    rest = manifest.model_copy(update={"cuda": None, "cuda_refusal": refusal, "files": kept})
    if rest != manifest:
        bundle.write_manifest(opened.directory, rest)
    return rest
