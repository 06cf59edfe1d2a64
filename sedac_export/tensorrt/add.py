"""Add a TensorRT target to a bundle."""

from pathlib import Path

from sedac_export.bundle import Bundle
from sedac_export.bundle.edit import edited_bundle
from sedac_export.bundle.manifest import settle_manifest
from sedac_export.bundle.plan_entries import BuildOptions, PlanSet
from sedac_export.bundle.staging import claimed
from sedac_export.console import StageProgress
from sedac_export.model.source import opened_model
from sedac_export.tensorrt.build_plans import build_plans, check_options, check_quantization
from sedac_runtime.flavour import Target


def add_target(
    directory: Path,
    target: Target,
    options: BuildOptions,
    model: str | None = None,
    progress: StageProgress = lambda *_: None,
    just_built: bool = False,
) -> PlanSet:
    """Build the plans of `target` for the bundle in `directory`.

    model is needed where the bundle holds no portable graphs: a directory, a GGUF file or a
    hub id, whose configuration is read; the weights are those of the bundle. just_built: the bundle
    was built from it just now. Raises SedacError.
    """
    check_options(target, options)
    with claimed(directory) as claim:
        settle_manifest(directory)
        # what is wrong with this target's own plans is put right by building them
        opened = Bundle.open(directory, replaced=f"engines/{target}")
        manifest = opened.manifest
        quantized = manifest.quantization
        symmetric = quantized is None or quantized.symmetric
        check_quantization(target, manifest.precision, symmetric)
        if manifest.portable is None and model is not None:
            from sedac_export.device_graphs.same_model import check_facts, check_graphs
            from sedac_export.model.skeleton import Skeleton
            from sedac_export.tensorrt.portable_writer import add_portable_graphs

            with opened_model(model, claim.scratch) as source, edited_bundle(opened) as copy:
                skeleton = Skeleton.load(source.directory)
                check_facts(directory, manifest.model, model, skeleton)
                whole = add_portable_graphs(copy, manifest, skeleton, progress)
                if not just_built and whole.portable is not None:
                    check_graphs(copy, whole, whole.portable, directory, model)
        return build_plans(directory, target, options, progress)
