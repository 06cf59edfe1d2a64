"""Run the chain over texts and store, per token and depth, what the trainers need.

A collection is a directory of flat arrays, one file for each field, that are appended to document
by document and read memory-mapped. collection.json names what is complete; bytes beyond that are
what an interrupted run left, and the next run cuts them off.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from sedac_export.arrays import Array, Floats
from sedac_export.bundle.manifest import Manifest
from sedac_export.console import CountProgress
from sedac_export.errors import SedacError
from sedac_export.exits.replay.documents import Document, window_length
from sedac_export.exits.replay.replay import Replay, statistics
from sedac_export.exits.replay.signals import Signals

INDEX = "collection.json"
DEFAULT_BYTES = 4_000_000_000

_HALF_LIMIT = float(np.finfo(np.float16).max)


def layout(manifest: Manifest, depths: Sequence[int]) -> dict[str, tuple[str, int]]:
    """dtype and numbers per token of each field.

    token, next_token (-1 at the end of a window), first (1 at its beginning), full_token,
    full_entropy (nats), full_margin; stability of each layer; and for each depth hidden_DDD,
    exit_token_DDD, exit_margin_DDD and exit_entropy_DDD of the full head.
    """
    fields = {
        "token": ("<i4", 1),
        "next_token": ("<i4", 1),
        "first": ("|u1", 1),
        "full_token": ("<i4", 1),
        "full_entropy": ("<f4", 1),
        "full_margin": ("<f4", 1),
        "stability": ("<f4", manifest.model.num_layers),
    }
    for depth in depths:
        fields[f"hidden_{depth:03}"] = ("<f2", manifest.model.hidden_size)
        fields[f"exit_token_{depth:03}"] = ("<i4", 1)
        fields[f"exit_margin_{depth:03}"] = ("<f4", 1)
        fields[f"exit_entropy_{depth:03}"] = ("<f4", 1)
    fields[f"hidden_{manifest.model.num_layers:03}"] = ("<f2", manifest.model.hidden_size)
    return fields


def chain_fingerprint(manifest: Manifest) -> str:
    """SHA-256 over the weights of embedding, layers and head, which states depend on.

    Graphs do not count: probes become part of the layers'. Nothing that is added to a bundle
    changes the weights.
    """
    engines = manifest.engines
    graphs = [engines.embed, *(layer.file for layer in engines.layers), engines.head]
    names = sorted(str(PurePosixPath(graph).with_suffix(".data")) for graph in graphs)
    weights = [(name, manifest.files[name].sha256) for name in names if name in manifest.files]
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()


@dataclass
class Collection:
    """A collection in `directory`: its layout and the documents that are complete.

    fingerprint: `chain_fingerprint` of the model that it is of.
    """

    directory: Path
    fingerprint: str
    depths: list[int]
    fields: dict[str, tuple[str, int]]
    documents: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of all complete documents."""
        return sum(int(document["tokens"]) for document in self.documents)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of all fields of one token."""
        return sum(np.dtype(kind).itemsize * size for kind, size in self.fields.values())

    def read(self, name: str) -> Array:
        """A field of all tokens, memory-mapped, [tokens] or [tokens, size]."""
        kind, size = self.fields[name]
        shape = (self.tokens,) if size == 1 else (self.tokens, size)
        result: Array = np.memmap(self.directory / name, dtype=kind, mode="r", shape=shape)
        return result

    def document_ids(self) -> npt.NDArray[np.int64]:
        """The index of each token's document, int64 [tokens]."""
        counts = [document["tokens"] for document in self.documents]
        return np.repeat(np.arange(len(counts)), counts)

    def append(self, document: Document, values: dict[str, Array]) -> None:
        """Add a document's fields, then commit it to the index."""
        for name, (kind, size) in self.fields.items():
            with (self.directory / name).open("ab") as file:
                file.truncate(self.tokens * size * np.dtype(kind).itemsize)
                file.write(np.ascontiguousarray(values[name], dtype=kind).data)
        entry = {"name": document.name, "sha256": document.sha256}
        self.documents.append(entry | {"tokens": len(values["token"])})
        self._commit()

    def _commit(self) -> None:
        facts = {key: value for key, value in vars(self).items() if key != "directory"}
        staged = self.directory / f".{INDEX}"
        staged.write_text(json.dumps(facts, indent=1) + "\n")
        staged.rename(self.directory / INDEX)


def open_collection(directory: Path, manifest: Manifest, depths: Sequence[int]) -> Collection:
    """The collection in `directory`, a new one where there is none.

    It may have more depths than `depths`. Raises SedacError when it is another model's, lacks a
    depth or is damaged.
    """
    fresh = Collection(
        directory, chain_fingerprint(manifest), list(depths), layout(manifest, depths)
    )
    index = directory / INDEX
    if not index.exists():
        if directory.exists() and any(directory.iterdir()):
            raise SedacError(
                f"{directory} is neither a collection nor empty; choose another directory"
            )
        directory.mkdir(parents=True, exist_ok=True)
        return fresh
    try:
        facts = json.loads(index.read_text())
        fields = {name: (str(kind), int(size)) for name, (kind, size) in facts["fields"].items()}
        found = Collection(directory, **(facts | {"fields": fields}))
        held = found.tokens
    except (ValueError, KeyError, TypeError) as error:
        raise SedacError(f"{index} cannot be read; delete {directory} and collect again") from error
    if found.fingerprint != fresh.fingerprint:
        raise SedacError(f"{directory} was collected from another model; choose another directory")
    if not fresh.fields.items() <= found.fields.items():
        raise SedacError(
            f"{directory} was collected at depths {found.depths}, which are not all of"
            f" {fresh.depths}; ask for no others, or choose another directory"
        )
    for name, (kind, size) in fields.items():
        _require_whole(directory / name, held * size * np.dtype(kind).itemsize)
    return found


def _require_whole(path: Path, least: int) -> None:
    """Raise SedacError where a field's file lacks some of what the index names."""
    actual = path.stat().st_size if path.is_file() else 0
    if actual < least:
        raise SedacError(
            f"{path} is damaged: {actual} bytes instead of {least}; delete {path.parent} and"
            " collect again"
        )


def collect(
    replay: Replay,
    documents: Sequence[Document],
    directory: Path,
    depths: Sequence[int],
    max_bytes: int = DEFAULT_BYTES,
    progress: CountProgress = lambda *_: None,
) -> Collection:
    """Collect `documents` at `depths` into `directory`; those it already holds are skipped.

    It ends before the document that would take it beyond `max_bytes`. progress gets the tokens
    done and their number.

    Raises SedacError when it holds other documents, not even one fits, or the disk is full.
    """
    collection = open_collection(directory, replay.manifest, depths)
    _refuse_others(collection, documents)
    held = {document["sha256"] for document in collection.documents}
    total = sum(len(document.tokens) for document in documents)
    for document in documents:
        if document.sha256 in held:
            continue
        size = len(document.tokens) * collection.bytes_per_token
        if collection.tokens * collection.bytes_per_token + size > max_bytes:
            break
        if size > shutil.disk_usage(directory).free:
            raise SedacError(f"{directory}: no room for {size / 1e6:.0f} MB more; free some space")
        values = _document(replay, document, collection)
        if values is not None:
            collection.append(document, values)
        progress(collection.tokens, total)
    if not collection.documents:
        raise SedacError(f"no document fits into {max_bytes} bytes; raise --max-bytes")
    return collection


def _refuse_others(collection: Collection, documents: Sequence[Document]) -> None:
    """Raise SedacError where the collection holds what is none of `documents`."""
    given = {document.sha256 for document in documents}
    others = [d["name"] for d in collection.documents if d["sha256"] not in given]
    if others:
        raise SedacError(
            f"{collection.directory} holds other data, such as {others[0]}; give all that it"
            " was collected from as --data, or choose another directory"
        )


def left_out(collection: Collection, documents: Sequence[Document]) -> int:
    """How many of `documents` a limit kept out; those of one token are never collected."""
    held = {document["sha256"] for document in collection.documents}
    return sum(d.sha256 not in held and len(d.tokens) > 1 for d in documents)


def _document(
    replay: Replay, document: Document, collection: Collection
) -> dict[str, Array] | None:
    """All fields of a document, None when it has one token only."""
    length = window_length(replay.manifest)
    windows = [_window(replay, window, collection.depths) for window in document.windows(length)]
    if not windows:
        return None
    return {name: np.concatenate([w[name] for w in windows]) for name in collection.fields}


def _window(replay: Replay, window: Document, depths: Sequence[int]) -> dict[str, Array]:
    """All fields of one window."""
    stored = {*depths, replay.num_layers}
    hidden: dict[int, list[Floats]] = {depth: [] for depth in stored}
    stabilities: list[list[Floats]] = [[] for _ in range(replay.num_layers)]

    def watch(x: Floats, signals: Signals) -> None:
        if signals.depth in stored:
            hidden[signals.depth].append(x.copy())
        if signals.depth:
            stabilities[signals.depth - 1].append(signals.stability.copy())

    trace = replay.run(window.tokens, watch=watch)
    values: dict[str, Array] = {
        "token": window.tokens,
        "next_token": np.append(window.tokens[1:], -1),
        "first": np.arange(len(window.tokens)) == 0,
        "full_token": trace.tokens,
        "full_entropy": trace.entropies,
        "full_margin": trace.margins,
        "stability": np.stack([np.concatenate(layer) for layer in stabilities], axis=1),
    }
    for depth in stored:
        whole = np.concatenate(hidden[depth])
        values[f"hidden_{depth:03}"] = np.clip(whole, -_HALF_LIMIT, _HALF_LIMIT)
        if depth < replay.num_layers:
            values |= _exit_fields(replay, depth, hidden[depth])
    return values


def _exit_fields(replay: Replay, depth: int, parts: list[Floats]) -> dict[str, Array]:
    """What the full head says of the hidden states at `depth`, some of them at a time."""
    rows: Iterator[tuple[Array, ...]] = (
        statistics(replay.plain_logits(part), part[:0, 0].astype(np.int64)) for part in parts
    )
    tokens, entropies, margins, _ = (np.concatenate(column) for column in zip(*rows, strict=True))
    return {
        f"exit_token_{depth:03}": tokens,
        f"exit_margin_{depth:03}": margins,
        f"exit_entropy_{depth:03}": entropies,
    }
