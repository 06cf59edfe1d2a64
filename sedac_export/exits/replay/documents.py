"""Texts as token ids: what probes are trained on, and exits calibrated and reported on."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from sedac_export.bundle import Bundle
from sedac_export.bundle.manifest import Manifest
from sedac_export.errors import SedacError

TOKENIZER = "tokenizer.json"
# tokens that are replayed as one text at most
_WINDOW = 2048
# above this share of unknown tokens, a text says nothing about the model
_MOST_UNKNOWN = 0.1


@dataclass(frozen=True)
class Document:
    """One file: its token ids, int64 [tokens], and the SHA-256 of its bytes."""

    name: str
    tokens: npt.NDArray[np.int64]
    sha256: str

    def windows(self, length: int) -> Iterator["Document"]:
        """The document in pieces of at most `length` tokens; pieces of one token are left out."""
        for start in range(0, len(self.tokens), length):
            tokens = self.tokens[start : start + length]
            if len(tokens) > 1:
                yield Document(self.name, tokens, self.sha256)


def window_length(manifest: Manifest) -> int:
    """Tokens that are replayed as one text: longer documents are cut."""
    return min(manifest.max_cache_length, _WINDOW)


def read_documents(
    bundle: Bundle, files: Sequence[Path], limit: int | None = None
) -> list[Document]:
    """The UTF-8 texts `files`, encoded by the tokenizer of `bundle`.

    limit: tokens of each document that are kept. Files with the same content count once; the
    second would not be independent of the first.

    Raises SedacError for files that are empty, unreadable or no UTF-8, or that the tokenizer does
    not know, and when the bundle has no tokenizer.
    """
    manifest = bundle.manifest
    if not manifest.tokenizer:
        raise SedacError(f"{bundle.directory} has no tokenizer, so texts cannot be read for it")
    if not files:
        raise SedacError("--data names no file; give text files that the model has not seen")
    text = bundle.read(TOKENIZER)
    tokenizer = Tokenizer.from_buffer(text)
    unknown = _unknown_token(tokenizer, text)
    documents: dict[str, Document] = {}
    for path in text_files(files):
        data = _read(path)
        tokens = _encode(tokenizer, path, data, unknown)
        if int(tokens.max()) >= manifest.model.vocab_size:
            raise SedacError(
                f"{path} has token {int(tokens.max())}, which the model's vocabulary of"
                f" {manifest.model.vocab_size} lacks; the bundle's tokenizer is another model's"
            )
        digest = hashlib.sha256(data).hexdigest()
        documents.setdefault(digest, Document(str(path), tokens[:limit], digest))
    return list(documents.values())


def data_digest(documents: Sequence[Document]) -> str:
    """SHA-256 over the documents' own, independent of their order."""
    digests = sorted(document.sha256 for document in documents)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def split_documents(
    documents: Sequence[Document], shares: Sequence[float], seed: int = 0
) -> list[list[Document]]:
    """Disjoint groups of documents with about those shares of the tokens, at random by `seed`.

    Documents go whole, the longest first, each to the group that lacks most. Raises SedacError
    when there are fewer documents than groups.
    """
    if len(documents) < len(shares):
        raise SedacError(
            f"{len(documents)} documents cannot be split into {len(shares)} groups; give more files"
        )
    generator = np.random.default_rng(seed)
    total = sum(len(document.tokens) for document in documents)
    shuffled = [documents[index] for index in generator.permutation(len(documents))]
    groups: list[list[Document]] = [[] for _ in shares]
    lacking = [share * total for share in shares]
    for document in sorted(shuffled, key=lambda item: -len(item.tokens)):
        index = int(np.argmax(lacking))
        groups[index].append(document)
        lacking[index] -= len(document.tokens)
    if not all(groups):
        raise SedacError("one document outweighs the others, so no split is left; give more files")
    return groups


def text_files(paths: Sequence[Path]) -> Iterator[Path]:
    """The files `paths`, and those in directories among them, by name.

    Of a directory, what is hidden, empty or Python's cache is left out. Raises SedacError when
    nothing remains of one.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        inside = [p for p in sorted(path.rglob("*")) if p.is_file() and _is_text_of(path, p)]
        if not inside:
            raise SedacError(f"{path} holds no files; give text files or a directory of them")
        yield from inside


def _is_text_of(directory: Path, path: Path) -> bool:
    parts = path.relative_to(directory).parts
    ignored = any(part.startswith(".") or part == "__pycache__" for part in parts)
    return not ignored and path.stat().st_size > 0


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SedacError(f"{path} cannot be read ({error.strerror}); give text files") from error
    if not data.strip():
        raise SedacError(f"{path} is empty; leave it out of --data")
    return data


def _encode(
    tokenizer: Tokenizer, path: Path, data: bytes, unknown: int | None
) -> npt.NDArray[np.int64]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SedacError(
            f"{path} is not UTF-8 (byte {error.start}); convert it or leave it out of --data"
        ) from error
    tokens = np.asarray(tokenizer.encode(text).ids, dtype=np.int64)
    if len(tokens) == 0:
        raise SedacError(f"{path} gives no tokens; leave it out of --data")
    share = 0.0 if unknown is None else float((tokens == unknown).mean())
    if share > _MOST_UNKNOWN:
        raise SedacError(
            f"{path} is not in this tokenizer's language: {share:.0%} of its tokens are unknown;"
            " give texts of the kind that the model was trained on"
        )
    return tokens


def _unknown_token(tokenizer: Tokenizer, text: bytes) -> int | None:
    """The id that stands for what the tokenizer does not know, if it has one."""
    name = json.loads(text).get("model", {}).get("unk_token")
    return None if name is None else tokenizer.token_to_id(name)
