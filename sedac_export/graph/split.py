"""Separate what depends on tokens from what depends on their positions alone."""

from collections.abc import Collection

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sedac_export.errors import SedacError

_POSITIONS = "position_ids"


def split_embed(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto | None]:
    """The part of `model` that gives `x`, and the part that gives its other outputs, the contexts.

    The second is None where `x` is the only output. Weights stay where they are. Raises SedacError
    when a context depends on anything but position_ids.
    """
    contexts = [output.name for output in model.graph.output if output.name != "x"]
    embed = _part(model, ["x"])
    if not contexts:
        return embed, None
    part = _part(model, contexts)
    inputs = [value.name for value in part.graph.input]
    if inputs != [_POSITIONS]:
        raise SedacError(
            f"the layers read tensors that are computed from {', '.join(inputs) or 'nothing'}"
            " instead of the tokens' positions; this model is not supported"
        )
    return embed, part


def _part(model: onnx.ModelProto, outputs: Collection[str]) -> onnx.ModelProto:
    """What of `model` the named outputs need."""
    part = ir.from_proto(model)
    kept = [value for value in part.graph.outputs if value.name in outputs]
    part.graph.outputs.clear()
    part.graph.outputs.extend(kept)
    RemoveUnusedNodesPass()(part)
    for value in list(part.graph.inputs):
        if not value.uses() and value not in kept:
            part.graph.inputs.remove(value)
    proto = ir.to_proto(part)
    # initialisers' types, which their own entries give and a change of precision would leave behind
    del proto.graph.value_info[:]
    return proto
