"""The folder of a training: what is in it is gone on from by the same request only."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sedac_export.errors import SedacError

REQUEST = "request.json"
# of each weight's numbers, what the model is recognised by
_NUMBERS = 64
# what of a configuration says where the model is from, or how it was loaded
_IRRELEVANT = {"_name_or_path", "dtype", "torch_dtype", "transformers_version"}


def open_folder(folder: Path, wanted: dict[str, Any], contents: Iterable[str]) -> None:
    """Make `folder` that of the request `wanted`, as JSON has it.

    contents: names of files that a training leaves. Raises SedacError where the folder is none, or
    holds what another request left.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / REQUEST
        if path.exists():
            found = path.read_text() == _text(wanted)
        else:
            found = not any((folder / name).exists() for name in contents)
            if found:
                path.write_text(_text(wanted))
    except OSError as error:
        raise SedacError(
            f"--output {folder} cannot be written ({error.strerror}); give a directory"
        ) from error
    if not found:
        raise SedacError(
            f"--output {folder} holds the training of another model, or with other --data,"
            " --self-distill or --seed; give another directory, or delete it"
        )


def _text(wanted: dict[str, Any]) -> str:
    return json.dumps(wanted, indent=1, sort_keys=True) + "\n"


def fingerprint(model: PreTrainedModel) -> str:
    """What tells `model` from others: a digest of its configuration and some of each weight.

    It is the same on every device, in fp32 and in bf16.
    """
    config = model.config.to_dict()
    kept = {name: value for name, value in config.items() if name not in _IRRELEVANT}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        numbers = weight.flatten()[:_NUMBERS].to("cpu", torch.bfloat16)
        digest.update(name.encode() + numbers.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def digest_of(texts: Iterable[str]) -> str:
    """A digest of `texts` in their order."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()
