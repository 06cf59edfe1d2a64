"""How far the chain is from the bundle's ONNX Runtime engines, which the build has validated.

The same comparison serves what the packed weights give on the CPU and what the kernel gives on a
GPU: it is given a runner of the chain.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sedac_export.arrays import Array, Floats
from sedac_export.bundle import Bundle
from sedac_export.bundle.agreement_row import AgreementRow, Gates
from sedac_export.bundle.manifest import LayerEngineEntry
from sedac_export.bundle.runner import BundleRunner, PassInputs
from sedac_export.bundle.sessions import Caches

# tokens of the text: passes of 8 and, from layer to layer, what a sliding window no longer shows
TOKENS = 208

# positions whose logits are compared at once
_LOGITS = 16

_KINDS = ("key", "value")


@dataclass(frozen=True)
class ChainOutput:
    """Hidden states [tokens, hidden], or logits [tokens, vocabulary] after the model's last layer.

    stabilities: that of the last layer, at some of the positions.
    """

    values: Floats
    stabilities: dict[int, float]


class ChainRunner(Protocol):
    """Runs layers of a chain over a text from position 0 on."""

    def run(self, start: Array, first_layer: int, depth: int) -> ChainOutput:
        """Take a text from `first_layer` to `depth` layers.

        start: token ids int64 [tokens] for layer 0, hidden states fp32 [tokens, hidden] for others.
        """

    def run_after_exits(self, tokens: Array, exits: int, depth: int) -> Floats:
        """Logits [tokens, vocabulary] of all but the first `exits` of `tokens`, int64.

        The first ones exit after `depth` layers: the layers that they skip have the keys and values
        that they make of the hidden states there.
        """


def compare(bundle: Bundle, runner: ChainRunner, gates: Gates) -> list[dict[str, Any]]:
    """Each layer engine on the reference's own hidden states, then the chain: a report of each.

    The first begins with the embedding and the last ends with the head, which the kernel does not
    run alone.
    """
    return [row.report(gates) for row in _ChainComparison(bundle, runner, gates.epsilon).rows()]


class _ChainComparison:
    def __init__(self, bundle: Bundle, runner: ChainRunner, epsilon: float) -> None:
        self.manifest, self.runner, self.epsilon = bundle.manifest, runner, epsilon
        self.reference = BundleRunner.engine_by_engine(bundle.directory, bundle.manifest)
        count = min(TOKENS, bundle.manifest.max_cache_length)
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(0, bundle.manifest.model.vocab_size, count)

    def rows(self) -> list[AgreementRow]:
        inputs = self.reference.begin(slice(0, len(self.tokens)))
        hidden = self.reference.embed(self.tokens, inputs)
        engines, rows = self.manifest.engines.layers, []
        early = engines[len(engines) // 2]
        for entry in engines:
            before, (hidden, stability) = hidden, self._reference_layers(entry, hidden, inputs)
            start = self.tokens if entry.first_layer == 0 else before[0]
            row = AgreementRow(Path(entry.file).stem)
            self._compare(row, start, entry, hidden, stability)
            rows.append(row)
            if entry is early and entry.first_layer > 0:
                row = AgreementRow(f"exit before {row.engine}")
                output = self.runner.run(self.tokens, 0, entry.first_layer)
                row.add(output.values, before[0])
                rows.append(row)
                rows.append(self._after_exits(entry, before))
        rows.append(self._end_to_end(hidden))
        return rows

    def _reference_layers(
        self, entry: LayerEngineEntry, hidden: Floats, inputs: PassInputs
    ) -> tuple[Floats, Floats]:
        """Hidden states [1, tokens, hidden] after an engine, and stabilities [tokens] there."""
        caches = self.reference.empty_caches(entry.first_layer, entry.num_layers, len(self.tokens))
        outputs = self.reference.layers(entry, hidden, inputs, caches)
        return outputs["y"], outputs["stability"][0, :, -1]

    def _compare(
        self,
        row: AgreementRow,
        start: Array,
        entry: LayerEngineEntry,
        hidden: Floats,
        stability: Floats,
    ) -> None:
        depth = entry.first_layer + entry.num_layers
        output = self.runner.run(start, entry.first_layer, depth)
        if depth == self.manifest.model.num_layers:
            self._add_logits(row, output.values, hidden)
        else:
            row.add(output.values, hidden[0])
        for position, value in output.stabilities.items():
            row.add_stability(np.array(value), stability[position])

    def _after_exits(self, first: LayerEngineEntry, hidden: Floats) -> AgreementRow:
        """Tokens at full depth behind others that exit before the engine `first`, at `hidden`."""
        row = AgreementRow(f"after exits before {Path(first.file).stem}")
        exits, count = len(self.tokens) // 2, len(self.tokens)
        inputs = self.reference.begin(slice(exits, count))
        after, engines = hidden[:, exits:], self.manifest.engines.layers
        for entry in engines[engines.index(first) :]:
            caches = self.reference.empty_caches(entry.first_layer, entry.num_layers, count)
            self._fill(entry, hidden[:, :exits], caches)
            after = self.reference.layers(entry, after, inputs, caches)["y"]
        logits = self.runner.run_after_exits(self.tokens, exits, first.first_layer)
        self._add_logits(row, logits, after)
        return row

    def _fill(self, entry: LayerEngineEntry, hidden: Floats, caches: Caches) -> None:
        """Write keys and values of `hidden`, from position 0 on, to an engine's `caches`."""
        inputs = self.reference.begin(slice(0, hidden.shape[1]))
        for place in range(entry.num_layers):
            of_layer = {f"past_{kind}_0": caches[f"past_{kind}_{place}"] for kind in _KINDS}
            self.reference.key_value(entry.first_layer + place, hidden, inputs, of_layer)

    def _end_to_end(self, hidden: Floats) -> AgreementRow:
        row = AgreementRow("end to end")
        output = self.runner.run(self.tokens, 0, self.manifest.model.num_layers)
        self._add_logits(row, output.values, hidden)
        return row

    def _add_logits(self, row: AgreementRow, logits: Floats, hidden: Floats) -> None:
        """Compare with the head's of the reference's last hidden states."""
        for start in range(0, len(logits), _LOGITS):
            part = slice(start, start + _LOGITS)
            row.add_logits(logits[None, part], self.reference.head(hidden[:, part]), self.epsilon)
