"""The runtimes that SEDAC is compared with, and the model in the form that each of them loads."""

import importlib.util
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from sedac_runtime import _core
from sedac_runtime._core import EngineError, InputError

PeerName = Literal["onnxruntime-genai", "llama.cpp", "transformers"]
PEERS: tuple[PeerName, ...] = get_args(PeerName)

_LOG = logging.getLogger(__name__)
_MODULES: dict[PeerName, tuple[str, ...]] = {
    "onnxruntime-genai": ("onnxruntime_genai",),
    "llama.cpp": ("llama_cpp",),
    "transformers": ("transformers", "torch"),
}
_PACKAGES: dict[PeerName, str] = {
    "onnxruntime-genai": "onnxruntime-genai",
    "llama.cpp": "llama-cpp-python",
    "transformers": "transformers torch",
}
_FORMS: dict[PeerName, str] = {
    "onnxruntime-genai": "a checkpoint's directory, a hub id, or its model builder's output",
    "llama.cpp": "a GGUF file of the same weights",
    "transformers": "a checkpoint's directory or a hub id",
}
_GENAI_CONFIG = "genai_config.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def parse_peers(text: str) -> list[PeerName]:
    """The names in a list such as onnxruntime-genai,llama.cpp. Raises InputError."""
    found = [_known(name) for name in text.split(",")]
    if None in found:
        raise InputError(
            f"--against {text} is neither full, monolith nor a list of {', '.join(PEERS)}"
        )
    return [name for name in found if name is not None]


def parse_peer_models(texts: Sequence[str]) -> dict[PeerName, str]:
    """Models by peer, of texts such as llama.cpp=FILE. Raises InputError."""
    found = {}
    for text in texts:
        name, _, model = text.partition("=")
        known = _known(name)
        if known is None or not model:
            raise InputError(
                f"--peer-model {text} is not NAME=PATH with one of the names {', '.join(PEERS)}"
            )
        found[known] = model
    return found


def check_asked_for(peers: Sequence[PeerName], given: Iterable[PeerName]) -> None:
    """Raises InputError where a model is `given` for another runtime than `peers`."""
    for name in given:
        if name not in peers:
            raise InputError(
                f"a model is given for {name}, which is not compared with; name it in --against or"
                " leave its model out"
            )


def _known(name: str) -> PeerName | None:
    return next((known for known in PEERS if known == name), None)


def installed_peers(peers: Sequence[PeerName]) -> list[PeerName]:
    """Those of `peers` that are installed; a warning names each of the others.

    Raises InputError when none is left, or one is no runtime that SEDAC is compared with.
    """
    for name in peers:
        if _known(name) is None:
            raise InputError(f"runtime {name!r} is none of {', '.join(PEERS)}")
    found = [name for name in dict.fromkeys(peers) if not _missing(name)]
    absent = [name for name in dict.fromkeys(peers) if name not in found]
    remedy = f"pip install {' '.join(_PACKAGES[name] for name in absent)}"
    if not found:
        raise InputError(f"{' and '.join(absent)} cannot be compared with: not installed; {remedy}")
    if absent:
        _LOG.warning("left out, not installed: %s; %s", ", ".join(absent), remedy)
    return found


def _missing(name: PeerName) -> bool:
    return any(importlib.util.find_spec(module) is None for module in _MODULES[name])


def find_models(
    bundle: Path, peers: Sequence[PeerName], given: Mapping[PeerName, str]
) -> dict[PeerName, str]:
    """Where each of `peers` has its model from: what is `given`, or the bundle's hub id.

    Raises InputError for a peer that has none, or one that cannot be it.
    """
    source = str(_manifest(bundle)["model"]["name"])
    found = {}
    for name in peers:
        model = given.get(name) or (source if name != "llama.cpp" else "")
        is_file = name == "llama.cpp"
        exists = Path(model).is_file() if is_file else Path(model).is_dir()
        if not exists and (is_file or not _HUB_ID.fullmatch(model)):
            raise InputError(
                f"{name} has no model{f' at {model}' if name in given else ''}; give"
                f" --peer-model {name}=PATH, {_FORMS[name]}"
            )
        found[name] = model
    return found


def genai_model(bundle: Path, model: str, directory: Path) -> str:
    """`model` as onnxruntime-genai loads it: as it is, or built in `directory` like `bundle`.

    Raises EngineError when its model builder fails.
    """
    if (Path(model) / _GENAI_CONFIG).is_file():
        return model
    manifest = _manifest(bundle)
    quantization, precision = manifest["quantization"], manifest["precision"]
    options = []
    if quantization is None:
        precision = "fp32"  # SEDAC computes in fp32 whatever the storage type
    else:
        options = [
            "--extra_options",
            f"block_size={quantization['block_size']}",
            f"is_symmetric={str(quantization['symmetric']).lower()}",
            "accuracy_level=4",
        ]
    source = "-i" if Path(model).is_dir() else "-m"
    _LOG.info("onnxruntime-genai builds %s in %s", model, precision)
    run = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", source, model),
            *("-o", directory / "model", "-p", precision, "-e", "cpu", "-c", directory / "cache"),
            *options,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if run.returncode:
        raise EngineError(f"onnxruntime-genai's builder fails on {model}: {last_line(run.stderr)}")
    return str(directory / "model")


def last_line(text: str) -> str:
    """The last line of `text` that is not empty."""
    lines = text.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "without a message")


def _manifest(bundle: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(_core.read_manifest(bundle))
    return manifest
