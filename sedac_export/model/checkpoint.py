"""Read a Hugging Face safetensors checkpoint one tensor at a time."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sedac_export.errors import SedacError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

# numbers read at once: large enough for whole layers of small models, small beside any large one
_PIECE_NUMBERS = 1 << 23


@dataclass(frozen=True)
class Checkpoint:
    """Which file of a model directory holds which tensor. Nothing is kept in memory."""

    directory: Path
    files: dict[str, str]

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """Index `directory`'s safetensors files.

        Raises SedacError when there are none, when one that the index names is missing, when one
        is cut off or not a safetensors file, or when two hold the same tensor.
        """
        names = _file_names(directory)
        files: dict[str, str] = {}
        for name in names:
            try:
                with safe_open(directory / name, framework="pt") as handle:
                    held = list(handle.keys())
            except FileNotFoundError as error:
                raise SedacError(
                    f"{directory / name} is missing though {_INDEX} names it; download it again"
                ) from error
            except (SafetensorError, OSError) as error:
                raise SedacError(
                    f"{directory / name} is not a whole safetensors file ({error});"
                    " download it again"
                ) from error
            for tensor in held:
                if tensor in files:  # which is read depends on where transformers loads it to
                    raise SedacError(
                        f"{directory} holds weight {tensor} twice, in {files[tensor]} and in"
                        f" {name}; load the model with transformers and save_pretrained() it once"
                    )
                files[tensor] = name
        return cls(directory, files)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, read from the file's header."""
        with safe_open(self.directory / self.files[name], framework="pt") as handle:
            return tuple(handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The stored type of tensor `name` as safetensors writes it, such as BF16."""
        with safe_open(self.directory / self.files[name], framework="pt") as handle:
            return str(handle.get_slice(name).get_dtype())

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor `name` in its stored dtype, some rows at a time.

        The file is mapped only while it is read: memory does not grow with what was read.
        """
        with safe_open(self.directory / self.files[name], framework="pt") as handle:
            rows = handle.get_slice(name)
            shape = rows.get_shape()
            if not shape:
                yield handle.get_tensor(name)
                return
            step = max(1, _PIECE_NUMBERS // max(1, math.prod(shape[1:])))
            for start in range(0, shape[0], step):
                yield rows[start : start + step]

    def bytes(self) -> int:
        """Size of all weight files."""
        return sum((self.directory / name).stat().st_size for name in set(self.files.values()))


def _file_names(directory: Path) -> list[str]:
    # where there are both, transformers takes this one
    if (directory / _SINGLE).exists():
        return [_SINGLE]
    index = directory / _INDEX
    if index.exists():
        try:
            return sorted(
                {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
            )
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise SedacError(
                f"{index} is not a weight index ({error}); download it again"
            ) from error
    others = sorted(path.name for path in directory.glob("*.bin"))
    if others:
        raise SedacError(
            f"{directory} holds {others[0]} but no safetensors; load it with transformers and"
            " save_pretrained() it once to convert it"
        )
    raise SedacError(f"{directory} holds no {_SINGLE}; is it a model directory?")
