"""Optimization profiles: the shapes that a plan is built for."""

from pathlib import Path

import onnx

from sedac_export.bundle.plan_entries import BuildOptions

# tokens that one verification pass of a draft may have
VERIFIED_TOKENS = 16

Shapes = dict[str, list[list[int]]]


def most_tokens(options: BuildOptions, cache_length: int, head: bool) -> list[int]:
    """The largest number of tokens of each profile: decode, verify and prefill.

    The head has no third one: it is asked for the newest tokens only.
    """
    tokens = [1, VERIFIED_TOKENS, options.max_prefill_chunk]
    return [min(count, cache_length) for count in tokens[: 2 if head else 3]]


def profiles(
    model: onnx.ModelProto, options: BuildOptions, cache_length: int, head: bool
) -> list[Shapes]:
    """For each profile, smallest, expected and largest shape of every input with an open axis."""
    return [
        {
            value.name: [
                _shape(value, batch=1, tokens=1),
                _shape(value, batch=1, tokens=tokens),
                _shape(value, batch=options.max_batch_size, tokens=tokens),
            ]
            for value in model.graph.input
            if any(axis.dim_param for axis in value.type.tensor_type.shape.dim)
        }
        for tokens in most_tokens(options, cache_length, head)
    ]


def graph_profiles(
    graph: Path, options: BuildOptions, cache_length: int, head: bool
) -> list[Shapes]:
    """`profiles` of the ONNX file `graph`."""
    return profiles(onnx.load(graph, load_external_data=False), options, cache_length, head)


def _shape(value: onnx.ValueInfoProto, **sizes: int) -> list[int]:
    axes = value.type.tensor_type.shape.dim
    return [sizes[axis.dim_param] if axis.dim_param else axis.dim_value for axis in axes]
