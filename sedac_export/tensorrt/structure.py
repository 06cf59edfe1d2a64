"""What every network that TensorRT parses must look like, told from the manifest alone."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from sedac_export.bundle.manifest import Manifest
from sedac_export.bundle.plan_entries import PortableGraphs, PortableLayers

_FLOATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# what stands for all positions of the batch and of the pass in a described shape
_OPEN = -1

_IDS: list[Any] = ["int64", [_OPEN, _OPEN]]
_WRITE_INDEX: dict[str, list[Any]] = {"write_index": ["int64", [_OPEN]]}


@dataclass(frozen=True)
class Expected:
    """Inputs and outputs by name as [dtype, shape], aliases, and how many layers attend."""

    inputs: dict[str, list[Any]]
    outputs: dict[str, list[Any]]
    aliases: dict[str, str]
    attentions: int = 0

    def problems(self, found: dict[str, Any]) -> list[str]:
        """What is wrong with a network or engine `found`, a sentence each."""
        problems: list[str] = []
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            problems += _tensor_problems(kind, tensors, found[f"{kind}s"])
        for output, expected in self.aliases.items():
            alias = found["aliases"].get(output)
            if alias != expected:
                problems.append(f"output {output} does not share the memory of {expected}")
        return problems + self._layer_problems(found.get("layers"))

    def _layer_problems(self, layers: dict[str, int] | None) -> list[str]:
        if layers is None:
            return []
        updates = layers.get("KV_CACHE_UPDATE", 0)
        # attention with a soft cap is primitives around its softmax
        attentions = layers.get("ATTENTION_INPUT", 0) + layers.get("SOFTMAX", 0)
        problems = []
        if updates != len(self.aliases):
            problems.append(f"{updates} cache updates instead of {len(self.aliases)}")
        if attentions != self.attentions:
            problems.append(f"{attentions} attentions instead of {self.attentions}")
        return problems


def expectations(
    directory: Path, manifest: Manifest, portable: PortableGraphs
) -> dict[str, Expected]:
    """What to expect of the network of each portable graph of the bundle in `directory`."""
    return _Expectations(directory, manifest, portable).all()


def _tensor_problems(
    kind: str, expected: dict[str, list[Any]], found: dict[str, list[Any]]
) -> Iterable[str]:
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield f"{kind} {name} is missing"
        elif name not in expected:
            yield f"{kind} {name} should not be there"
        elif found[name] != expected[name]:
            yield f"{kind} {name} is {_words(found[name])} instead of {_words(expected[name])}"


def _words(tensor: list[Any]) -> str:
    dtype, shape = tensor
    return f"{dtype} {shape}"


class _Expectations:
    def __init__(self, directory: Path, manifest: Manifest, portable: PortableGraphs) -> None:
        self.directory, self.manifest, self.portable = directory, manifest, portable
        self.float = _FLOATS[manifest.device_precision()]
        self.hidden = [self.float, [_OPEN, _OPEN, manifest.model.hidden_size]]
        self.contexts = {name: [c.dtype, c.shape] for name, c in portable.contexts.items()}

    def all(self) -> dict[str, Expected]:
        portable, engines = self.portable, self.manifest.engines
        expected = {portable.embed: self._embed()}
        if portable.contexts_graph is not None:
            positions = {"position_ids": _IDS}
            expected[portable.contexts_graph] = Expected(positions, self.contexts, {})
        for entry, engine in zip(portable.layers, engines.layers, strict=True):
            # engines for CPUs may have rotary tables instead, which their kv engines do not
            fills = engines.key_value[entry.first_layer :][: entry.num_layers]
            contexts = {*engine.contexts, *(name for fill in fills for name in fill.contexts)}
            expected[entry.file] = self._layers(entry, contexts)
        for layer, file in enumerate(portable.key_value):
            expected[file] = self._key_value(layer, engines.key_value[layer].contexts)
        expected[portable.head] = Expected(
            {"x": self.hidden},
            {"logits": [self.float, [_OPEN, _OPEN, self.manifest.model.vocab_size]]},
            {},
        )
        return expected

    def _embed(self) -> Expected:
        model = onnx.load(self.directory / self.manifest.engines.embed, load_external_data=False)
        inputs = {value.name: _IDS for value in model.graph.input}
        return Expected(inputs, {"x": self.hidden}, {})

    def _layers(self, entry: PortableLayers, contexts: Collection[str]) -> Expected:
        layers = range(entry.first_layer, entry.first_layer + entry.num_layers)
        length = self.manifest.max_cache_length
        masks = {name: ["bool", [_OPEN, 1, _OPEN, length]] for name in entry.masks}
        inputs = {"x": self.hidden} | self._contexts(contexts) | masks | _WRITE_INDEX
        past, present, aliases = self._caches(list(layers))
        stability = {"stability": ["float32", [_OPEN, _OPEN, len(layers)]]}
        outputs = {"y": self.hidden} | present | stability
        return Expected(inputs | past, outputs, aliases, attentions=len(layers))

    def _key_value(self, layer: int, contexts: list[str]) -> Expected:
        past, present, aliases = self._caches([layer])
        inputs = {"x": self.hidden} | self._contexts(contexts) | _WRITE_INDEX
        return Expected(inputs | past, present, aliases)

    def _contexts(self, names: Collection[str]) -> dict[str, list[Any]]:
        return {name: self.contexts[name] for name in names}

    def _caches(
        self, layers: list[int]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]], dict[str, str]]:
        """Past, present and how they are aliased, of these layers in one engine."""
        past, present = {}, {}
        for place, layer in enumerate(layers):
            heads = self.manifest.key_value_heads[layer]
            shape = [_OPEN, heads.heads, self.manifest.max_cache_length, heads.head_size]
            for kind in ("key", "value"):
                past[f"past_{kind}_{place}"] = [self.float, shape]
                present[f"present_{kind}_{place}"] = [self.float, shape]
        return past, present, dict(zip(present, past, strict=True))
