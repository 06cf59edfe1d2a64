"""Add the portable graphs to a bundle."""

from pathlib import Path

import torch

from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.staging import whole_file
from sedac_export.console import StageProgress
from sedac_export.device_graphs.graph_writer import write_graphs
from sedac_export.graph.trace_model import trace_graphs
from sedac_export.model.precision import DTYPES
from sedac_export.model.quantization import BITS, Quantization
from sedac_export.model.skeleton import Skeleton
from sedac_export.tensorrt.portable import BATCH, PortableTracer
from sedac_export.tensorrt.quantized_portable import DATA, DequantizedWeights


def add_portable_graphs(
    directory: Path, manifest: bundle.Manifest, skeleton: Skeleton, progress: StageProgress
) -> bundle.Manifest:
    """Trace `skeleton` in the bundle's precision and write the graphs; the manifest with them.

    Raises SedacError when the bundle in `directory` is of another model.
    """
    with torch.no_grad():
        dtype = DTYPES[manifest.device_precision()]
        graphs = trace_graphs(skeleton, progress, PortableTracer, dtype, BATCH)
    quantized, written = manifest.quantization, []
    if quantized is None:
        portable = write_graphs(directory, manifest, graphs, "portable")
    else:
        written = [f"onnx/{DATA}"]
        with whole_file(directory / written[0]) as file:
            blocks = Quantization(BITS["int4"], quantized.block_size)
            point = DequantizedWeights(directory / "onnx", file, blocks)
            portable = write_graphs(directory, manifest, graphs, "portable", point)
    names = [*portable.files(), *written]
    files = manifest.files | {name: bundle.file_entry(directory, name) for name in names}
    whole = manifest.model_copy(update={"portable": portable, "files": files})
    bundle.write_manifest(directory, whole)
    return whole
