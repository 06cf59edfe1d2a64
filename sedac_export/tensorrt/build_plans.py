"""Build a bundle's plans, one engine at a time, so that a build that was killed goes on."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from pydantic import BaseModel

from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.plan_entries import BuildOptions, PlanEntry, PlanSet, PortableGraphs
from sedac_export.bundle.staging import replace_file, sync
from sedac_export.console import StageProgress
from sedac_export.errors import SedacError
from sedac_export.tensorrt.installed import cuda_version, require
from sedac_export.tensorrt.profiles import Shapes, graph_profiles
from sedac_export.tensorrt.worker import Worker
from sedac_runtime.flavour import FLAVOURS, Target, find_gpu, this_platform

_FINISHED = "finished.json"
_TIMING_CACHE = "timing.cache"


def check_quantization(target: Target, precision: bundle.Precision, symmetric: bool) -> None:
    """Raise SedacError for quantized weights that TensorRT's parser refuses.

    ONNX Runtime's quantizer gives the number of a block that is farthest from zero the lowest
    number of the range, by a scale that may be negative.
    """
    title = FLAVOURS[target].title
    if precision == "int8":
        raise SedacError(
            f"--target {target}: {title} takes no negative scales of blocks of 8 bits, and int8"
            " weights have some; build with --precision int4 or fp16"
        )
    if precision == "int4" and not symmetric:
        raise SedacError(
            f"--target {target}: {title} takes no zero points; build with --symmetric, or with"
            " --precision fp16"
        )


def check_options(target: Target, options: BuildOptions) -> None:
    """Raise SedacError when `target` is not installed or cannot be built with `options`."""
    flavour = require(target)
    if options.max_batch_size < 1:
        raise SedacError(f"--max-batch-size {options.max_batch_size} is out of range: 1 or more")
    if options.max_prefill_chunk < 1:
        raise SedacError(
            f"--max-prefill-chunk {options.max_prefill_chunk} is out of range: 1 or more"
        )
    if target == "tensorrt":
        _refuse_capabilities(options)
        return
    for name in ("version_compatible", "hardware_compatible"):
        if getattr(options, name):
            raise SedacError(
                f"--{name.replace('_', '-')} is not for {flavour.title}, whose plans run on every"
                " GPU of --compute-capabilities and on its own version; leave it out"
            )
    for capability in options.compute_capabilities:
        if capability not in flavour.compute_capabilities:
            raise SedacError(
                f"--compute-capabilities {capability} is none of"
                f" {', '.join(flavour.compute_capabilities)}, which {flavour.title} builds for"
            )


def _refuse_capabilities(options: BuildOptions) -> None:
    if options.compute_capabilities:
        raise SedacError(
            "--compute-capabilities is for tensorrt-rtx; TensorRT builds for the GPU of this host,"
            " or for all from Ampere on with --hardware-compatible"
        )
    if find_gpu() is None:
        raise SedacError(
            "--target tensorrt builds on a host with an NVIDIA GPU only, and none is found here;"
            " build there, or for RTX GPUs with --target tensorrt-rtx"
        )


def build_plans(
    directory: Path, target: Target, options: BuildOptions, progress: StageProgress
) -> PlanSet:
    """Build the plans of `target` for the bundle in `directory` and enter them in its manifest.

    Plans that an earlier build finished from the same graphs with the same options are kept.
    progress is called with the target, the plans done and their number. Raises SedacError when the
    bundle holds no portable graphs, and when TensorRT cannot take one of them.
    """
    check_options(target, options)
    manifest = bundle.read_manifest(directory)
    portable = manifest.portable
    if portable is None:
        raise SedacError(
            f"{directory} holds no graphs that TensorRT takes; name the model with --model to have"
            " them added"
        )
    with Worker(target) as worker:
        build = _Build(directory, manifest, portable, target, options, worker)
        return build.run(progress)


@dataclass
class _Build:
    directory: Path
    manifest: bundle.Manifest
    portable: PortableGraphs
    target: Target
    options: BuildOptions
    worker: Worker
    version: str = field(init=False)
    done: dict[str, "_Finished"] = field(init=False)

    def run(self, progress: StageProgress) -> PlanSet:
        self.version = self.worker.call("version")
        self.done = self._finished()
        self._withdraw()
        graphs = self.portable.files()
        progress(self.target, 0, len(graphs))
        kept = []
        for count, graph in enumerate(graphs):
            kept.append(self._plan(graph))
            progress(self.target, count + 1, len(graphs))
        return self._enter(kept)

    @property
    def place(self) -> Path:
        return self.directory / "engines" / self.target

    def _plan(self, graph: str) -> "_Finished":
        """The plan of `graph`: the one there is when it fits, else a new one."""
        fingerprint = self._fingerprint(graph)
        name = f"engines/{self.target}/{Path(graph).stem.removeprefix('portable_')}.plan"
        known = self.done.get(name)
        if known and known.plan.fingerprint == fingerprint and self._is_whole(known):
            return known
        plan = self.directory / name
        part = plan.with_suffix(".part")
        part.unlink(missing_ok=True)
        built = self.worker.call(
            "build",
            graph=str(self.directory / graph),
            plan=str(part),
            profiles=self._profiles(graph),
            options=self.options.model_dump(),
            decomposable=self.manifest.precision == "fp32",
            timing_cache=str(self.place / _TIMING_CACHE),
        )
        self._check_aliases(graph, built["aliases"])
        sync(part)
        part.rename(plan)
        entry = PlanEntry(
            file=name,
            graph=graph,
            fingerprint=fingerprint,
            seconds=round(built["seconds"], 3),
            aliases=built["aliases"],
        )
        self.done[name] = _Finished(plan=entry, file=bundle.file_entry(self.directory, name))
        self._remember()
        return self.done[name]

    def _check_aliases(self, graph: str, aliases: dict[str, str]) -> None:
        """Every cache must be updated in place: a copy per token would cost more than the layer."""
        model = onnx.load(self.directory / graph, load_external_data=False)
        for output in model.graph.output:
            expected = output.name.replace("present_", "past_")
            if output.name.startswith("present_") and aliases.get(output.name) != expected:
                raise SedacError(
                    f"{graph}: {FLAVOURS[self.target].title} does not update {expected} in place;"
                    " this model is not supported"
                )

    def _profiles(self, graph: str) -> list[Shapes]:
        length, head = self.manifest.max_cache_length, graph == self.portable.head
        return graph_profiles(self.directory / graph, self.options, length, head)

    def _fingerprint(self, graph: str) -> str:
        return fingerprint(self.directory, self.manifest, graph, self.version, self.options)

    def _is_whole(self, known: "_Finished") -> bool:
        try:
            return bundle.file_entry(self.directory, known.plan.file) == known.file
        except FileNotFoundError:
            return False

    def _finished(self) -> dict[str, "_Finished"]:
        """Plans of earlier builds: those of the manifest and those of a build that was killed."""
        plans = self.manifest.plans.get(self.target)
        entries = plans.plans if plans else []
        done = {
            entry.file: _Finished(plan=entry, file=self.manifest.files[entry.file])
            for entry in entries
        }
        path = self.place / _FINISHED
        if path.exists():
            left = (_Finished.model_validate(item) for item in json.loads(path.read_text()))
            done |= {finished.plan.file: finished for finished in left}
        return done

    def _remember(self) -> None:
        finished = [finished.model_dump() for finished in self.done.values()]
        replace_file(self.place / _FINISHED, json.dumps(finished))

    def _withdraw(self) -> None:
        """Take the target's plans out of the manifest, which never names one being replaced."""
        self.place.mkdir(parents=True, exist_ok=True)
        if self.place.resolve() != self.directory.resolve() / "engines" / self.target:
            raise SedacError(f"{self.place} leads out of the bundle; remove the link there")
        self._remember()
        if self.target in self.manifest.plans:
            self._write({}, {})

    def _enter(self, kept: list["_Finished"]) -> PlanSet:
        gpu = find_gpu()
        capabilities = self.options.compute_capabilities or list(
            FLAVOURS[self.target].compute_capabilities
        )
        plans = PlanSet(
            version=self.version,
            cuda=cuda_version(self.target),
            platform=this_platform(),
            built_on=gpu.name if gpu else None,
            compute_capabilities=capabilities or [gpu.compute_capability if gpu else ""],
            options=self.options,
            plans=[finished.plan for finished in kept],
        )
        self._write({self.target: plans}, {finished.plan.file: finished.file for finished in kept})
        self._sweep()
        return plans

    def _sweep(self) -> None:
        """Remove what the manifest does not name, once it names all there is to keep."""
        for path in self.place.iterdir():
            name = f"engines/{self.target}/{path.name}"
            if name not in self.manifest.files and path.name != _TIMING_CACHE:
                path.unlink()

    def _write(self, plans: dict[Target, PlanSet], files: dict[str, bundle.FileEntry]) -> None:
        others = {name: those for name, those in self.manifest.plans.items() if name != self.target}
        prefix = f"engines/{self.target}/"
        rest = {name: e for name, e in self.manifest.files.items() if not name.startswith(prefix)}
        update = {"plans": others | plans, "files": rest | files}
        self.manifest = self.manifest.model_copy(update=update)
        bundle.write_manifest(self.directory, self.manifest)


class _Finished(BaseModel):
    """A plan and the digest of its file."""

    plan: PlanEntry
    file: bundle.FileEntry


def fingerprint(
    directory: Path, manifest: bundle.Manifest, graph: str, version: str, options: BuildOptions
) -> str:
    """SHA-256 of all that goes into the plan of `graph`: graph, weights, version and options."""
    model = onnx.load(directory / graph, load_external_data=False)
    weights = sorted({f"onnx/{location}" for location in _locations(model)})
    digests = [manifest.files[name].sha256 for name in (graph, *weights)]
    what = [digests, version, options.model_dump()]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _locations(model: onnx.ModelProto) -> Iterator[str]:
    for initializer in model.graph.initializer:
        for item in initializer.external_data:
            if item.key == "location":
                yield item.value
