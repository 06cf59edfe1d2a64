"""Time a bundle in the runtime, under the exit configuration it has."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sedac_export.bundle.manifest import read_manifest
from sedac_export.bundle.sessions import THREADS
from sedac_export.errors import SedacError
from sedac_export.exits.replay.documents import Document

TOKENS = 256
PIECES = 6
# no stability is above 1, so this runs every layer of every token
NEVER = 2.0


def measure_speedup(directory: Path, documents: Sequence[Document]) -> float:
    """Time per token at full depth over that with exits, token by token along given texts.

    The texts are pieces from the middle of the longest of `documents`. Full depth and exits take
    turns on each, after a warm-up; the figure is the ratio of their total times, where a piece
    counts with the quicker of two runs.

    Raises SedacError when the runtime refuses the bundle.
    """
    # only what measures needs the runtime and the engines that come with it
    from sedac_runtime import SedacError as RuntimeRefusal
    from sedac_runtime import SedacModel

    try:
        model = SedacModel.from_pretrained(directory, threads=THREADS)
        pieces = _pieces(documents, min(TOKENS, read_manifest(directory).max_cache_length))
        _seconds(model.follow, pieces[0])
        with_exits, full = 0.0, 0.0
        for piece in pieces:
            pairs = [
                (
                    _seconds(model.follow, piece),
                    _seconds(lambda p: model.follow(p, policy="stability", tau=NEVER), piece),
                )
                for _ in range(2)
            ]
            with_exits += min(pair[0] for pair in pairs)
            full += min(pair[1] for pair in pairs)
    except RuntimeRefusal as error:
        raise SedacError(f"the runtime cannot be timed: {error}") from error
    return full / with_exits


def _seconds(run: Callable[[list[int]], object], tokens: list[int]) -> float:
    started = time.perf_counter()
    run(tokens)
    return time.perf_counter() - started


def _pieces(documents: Sequence[Document], tokens: int) -> list[list[int]]:
    longest = sorted(documents, key=lambda document: -len(document.tokens))[:PIECES]
    pieces = []
    for document in longest:
        start = max(0, len(document.tokens) - tokens) // 2
        pieces.append(document.tokens[start : start + tokens].tolist())
    return pieces
