"""What the exits of a bundle say and do on texts at full depth: what settings are searched on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sedac_export.arrays import Floats, Mask
from sedac_export.console import CountProgress
from sedac_export.errors import SedacError
from sedac_export.exits.calibration.learn_then_test import Losses
from sedac_export.exits.replay.documents import Document, window_length
from sedac_export.exits.replay.replay import Replay, Trace
from sedac_export.exits.replay.signals import Signals
from sedac_runtime._core import PolicySettings


@dataclass
class Observations:
    """n tokens, first tokens of texts aside, and what each exit depth said of them.

    full, full_entropy, [n]; stability [n, layers]; by exit depth tokens, margin, entropy and
    learned [n] (the last three only where the bundle has an exit engine); risk [n] by probe depth.
    """

    num_layers: int
    full: npt.NDArray[np.int64]
    full_entropy: Floats
    stability: Floats
    tokens: dict[int, npt.NDArray[np.int64]]
    margin: dict[int, Floats]
    learned: dict[int, Floats]
    risk: dict[int, Floats]

    def wrong(self, depth: int) -> Mask:
        """Whose token after `depth` layers is not full depth's."""
        mask: Mask = self.tokens[depth] != self.full
        return mask

    def exit_signals(self, depth: int) -> Floats:
        """The exit engine's signals after `depth` layers but the entropy, 0: fp32 [n, 3]."""
        margin, learned = self.margin[depth], self.learned[depth]
        return np.stack([margin, np.zeros_like(margin), learned], axis=1)

    def full_by_document(
        self, documents: Sequence[Document], window: int
    ) -> dict[str, npt.NDArray[np.int64]]:
        """Full depth's tokens by the digest of the documents that were observed."""
        counts = self.counts(documents, window)
        parts = np.split(self.full, np.cumsum(counts)[:-1])
        return {d.sha256: part for d, part in zip(documents, parts, strict=True) if len(part)}

    def counts(self, documents: Sequence[Document], window: int) -> list[int]:
        """How many of the tokens are of each of the documents that were observed."""
        return [sum(len(w.tokens) - 1 for w in d.windows(window)) for d in documents]


class _SignalRecorder:
    """Notes every signal of a text, and the token of every exit depth."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.stability: dict[int, list[Floats]] = {}
        self.signals: dict[int, list[Floats]] = {}
        self.risk: dict[int, list[Floats]] = {}
        self.tokens: dict[int, list[npt.NDArray[np.int64]]] = {}

    def __call__(self, hidden: Floats, signals: Signals) -> None:
        depth, replay = signals.depth, self.replay
        if depth:
            self.stability.setdefault(depth, []).append(signals.stability.copy())
        if signals.risk is not None:
            self.risk.setdefault(depth, []).append(signals.risk)
        if depth in replay.exits:
            self.signals.setdefault(depth, []).append(signals.exit)
        if depth in replay.early:
            tokens = replay.logits(depth, hidden).argmax(-1)
            self.tokens.setdefault(depth, []).append(tokens)


def observe(
    replay: Replay, documents: Sequence[Document], progress: CountProgress = lambda *_: None
) -> Observations:
    """Run `documents` at full depth and ask every exit depth about every token.

    Raises SedacError when the model knows the texts no better than it would by guessing.
    """
    parts, losses, done = [], [], 0
    total = sum(len(document.tokens) for document in documents)
    for document in documents:
        for window in document.windows(window_length(replay.manifest)):
            part, trace = _window(replay, window)
            parts.append(part)
            losses.append(trace.losses[:-1])
        done += len(document.tokens)
        progress(done, total)
    if not parts:
        raise SedacError("no document has two tokens or more; give more --data")
    check_language(np.concatenate(losses), replay.manifest.model.vocab_size)
    return _join(parts)


def check_language(losses: Floats, vocabulary: int) -> None:
    """Raise SedacError when the mean of `losses` (nats) is that of guessing or above it."""
    if float(losses.mean()) >= np.log(vocabulary):
        raise SedacError(
            f"the model knows these texts no better than guessing among {vocabulary} tokens (loss"
            f" {losses.mean():.1f} nats); is the data in its language, the tokenizer its own?"
        )


def count_losses(
    replay: Replay,
    documents: Sequence[Document],
    full: dict[str, npt.NDArray[np.int64]],
    policy: PolicySettings,
    progress: CountProgress = lambda *_: None,
) -> tuple[Losses, npt.NDArray[np.int64]]:
    """Run `documents` with exits and kv_fill propagate: errors, and the layers run of each token.

    full: full depth's tokens by the document's digest, from `full_tokens`. First tokens of texts
    are not counted, they always run at full depth.
    """
    errors, counts, depths = [], [], []
    for number, document in enumerate(documents):
        traces = [
            replay.run(window.tokens, policy)
            for window in document.windows(window_length(replay.manifest))
        ]
        if traces:
            right = np.concatenate([trace.tokens[1:] for trace in traces])
            errors.append(int((right != full[document.sha256]).sum()))
            counts.append(len(right))
            depths += [trace.depths[1:] for trace in traces]
        progress(number + 1, len(documents))
    return Losses(np.array(errors), np.array(counts)), np.concatenate(depths)


def full_tokens(
    replay: Replay, documents: Sequence[Document], progress: CountProgress = lambda *_: None
) -> dict[str, npt.NDArray[np.int64]]:
    """Full depth's tokens of each document by its digest, first tokens of texts left out."""
    result = {}
    for number, document in enumerate(documents):
        windows = document.windows(window_length(replay.manifest))
        parts = [replay.run(window.tokens).tokens[1:] for window in windows]
        if parts:
            result[document.sha256] = np.concatenate(parts)
        progress(number + 1, len(documents))
    return result


def _window(replay: Replay, window: Document) -> tuple[Observations, Trace]:
    recorder = _SignalRecorder(replay)
    trace = replay.run(window.tokens, watch=recorder)
    signals = _without_first(recorder.signals)
    part = Observations(
        replay.num_layers,
        trace.tokens[1:],
        trace.entropies[1:],
        np.stack(list(_without_first(recorder.stability).values()), axis=1),
        _without_first(recorder.tokens),
        {depth: rows[:, 0] for depth, rows in signals.items()},
        {depth: rows[:, 2] for depth, rows in signals.items()},
        _without_first(recorder.risk),
    )
    return part, trace


def _without_first(chunks: dict[int, list[Any]]) -> dict[int, Any]:
    """By depth the chunks of a text as one, without its first token."""
    return {depth: np.concatenate(rows)[1:] for depth, rows in chunks.items()}


def _join(parts: list[Observations]) -> Observations:
    def whole(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    def by_depth(name: str) -> dict[int, Any]:
        depths = getattr(parts[0], name)
        return {d: np.concatenate([getattr(part, name)[d] for part in parts]) for d in depths}

    return Observations(
        parts[0].num_layers,
        full=whole("full"),
        full_entropy=whole("full_entropy"),
        stability=whole("stability"),
        tokens=by_depth("tokens"),
        margin=by_depth("margin"),
        learned=by_depth("learned"),
        risk=by_depth("risk"),
    )
