"""Where a model comes from: a directory, a GGUF file, or the hub."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sedac_export.errors import SedacError

_GGUF = ".gguf"


@dataclass(frozen=True)
class ModelSource:
    """A model's directory, what the model is called, and its tokenizer if it is not in there.

    note: what the user should know of it.
    """

    directory: Path
    name: str
    tokenizer: PreTrainedTokenizerBase | None = None
    note: str | None = None


@contextlib.contextmanager
def opened_model(
    name: str, scratch: Callable[[], AbstractContextManager[Path]]
) -> Iterator[ModelSource]:
    """The model `name`: a directory, a GGUF file, or a hub id that is downloaded.

    A GGUF file is converted in a directory of `scratch`, which removes it afterwards.
    Raises SedacError when it is none of these or cannot be read.
    """
    path = Path(name)
    if path.is_dir():
        yield ModelSource(path, path.resolve().name)
    elif path.suffix == _GGUF and path.is_file():
        from sedac_export.model.gguf_file import convert, tokenizer_note

        with scratch() as directory:
            yield ModelSource(directory, path.stem, convert(path, directory), tokenizer_note(path))
    else:
        yield ModelSource(_download(name), name)


def _download(name: str) -> Path:
    """The local copy of the hub's model `name`."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(_GGUF):
        raise SedacError(
            f"{name} is neither a model directory, a {_GGUF} file nor a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SedacError(
            f"{name} is not a directory here and cannot be downloaded from the hub: {reason}"
        ) from error
