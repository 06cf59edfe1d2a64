"""One runtime in a process of its own, which `sedac_runtime.bench_peers` starts.

It reads a request, one JSON object, from stdin and writes the answer, another, to stdout. Every
request has `runtime`, `model` (a path, or a hub id), `threads`, `capacity` (the most tokens of a
sequence) and `options` (SEDAC's). It asks for one of

- `texts` to encode: the answer has `tokens` of each;
- `prompts` to continue, lists of token ids, with `new_tokens` and `settings` (SEDAC's);
- `continuations` to judge, pairs of a prompt and tokens after it: the answer has the `agreement` of
  each, the share of the tokens that this runtime would have chosen after the same text.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

Request = Mapping[str, Any]
Answer = dict[str, Any]
# takes each generated token when it comes
Emit = Callable[[int], None]

WARM_UP_TOKENS = 2


class Runtime(Protocol):
    """A loaded model."""

    distribution: str
    """What is installed of it."""

    def generate(self, prompt: list[int], new_tokens: int, emit: Emit) -> None:
        """Continue `prompt` greedily by `new_tokens`, whatever ends a text."""


class _Sedac:
    """SEDAC on the CPU."""

    distribution = "sedac-runtime"

    def __init__(self, request: Request) -> None:
        from sedac_runtime import SedacModel

        self.model = SedacModel.from_pretrained(
            request["model"], threads=request["threads"], **request["options"]
        )
        self.settings = request.get("settings", {})

    def generate(self, prompt: list[int], new_tokens: int, emit: Emit) -> None:
        for token in self.model.stream(
            prompt, max_new_tokens=new_tokens, stop_tokens=[], **self.settings
        ):
            emit(token.id)

    def judge(self, prompt: list[int], tokens: list[int]) -> float:
        # with all layers no token exits; nothing is told of what follows the first token alone
        chosen, _ = self.model.follow(prompt + tokens, policy="stability", min_layer_ratio=1.0)
        known = tokens[1:] if len(prompt) == 1 else tokens
        return _equal_share(chosen[-1 - len(known) : -1], known)


class _Transformers:
    """transformers in fp32."""

    distribution = "transformers"

    def __init__(self, request: Request) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(request["threads"])
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            request["model"], dtype=torch.float32
        )
        self.model.generation_config.eos_token_id = None

    def generate(self, prompt: list[int], new_tokens: int, emit: Emit) -> None:
        import torch

        class Streamer:
            """The prompt comes first."""

            def __init__(self) -> None:
                self.is_prompt = True

            def put(self, tokens: torch.Tensor) -> None:
                if not self.is_prompt:
                    emit(int(tokens))
                self.is_prompt = False

            def end(self) -> None: ...

        ids = torch.tensor([prompt])
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=Streamer(),
        )

    def judge(self, prompt: list[int], tokens: list[int]) -> float:
        import torch

        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        return _equal_share(logits.argmax(-1).tolist(), tokens)


class _OnnxRuntimeGenAi:
    """onnxruntime-genai on the CPU."""

    distribution = "onnxruntime-genai"

    def __init__(self, request: Request) -> None:
        import onnxruntime_genai

        self.library = onnxruntime_genai
        decoder = {"session_options": {"intra_op_num_threads": request["threads"]}}
        facts = json.loads((Path(request["model"]) / "genai_config.json").read_text())["model"]
        # an id that the model does not choose
        never = {"eos_token_id": facts["vocab_size"] - 1}
        config = onnxruntime_genai.Config(request["model"])
        config.overlay(json.dumps({"model": {"decoder": decoder} | never}))
        self.model = onnxruntime_genai.Model(config)

    def generate(self, prompt: list[int], new_tokens: int, emit: Emit) -> None:
        options = self.library.GeneratorParams(self.model)
        options.set_search_options(max_length=len(prompt) + new_tokens, do_sample=False)
        generator = self.library.Generator(self.model, options)
        generator.append_tokens(prompt)
        for _ in range(new_tokens):
            generator.generate_next_token()
            emit(int(generator.get_next_tokens()[0]))


class _LlamaCpp:
    """llama.cpp on the CPU, by its Python package."""

    distribution = "llama-cpp-python"

    def __init__(self, request: Request) -> None:
        from llama_cpp import Llama

        threads = request["threads"]
        self.model = Llama(
            request["model"],
            n_ctx=request["capacity"],
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def generate(self, prompt: list[int], new_tokens: int, emit: Emit) -> None:
        self.model.reset()  # otherwise the cache of an equal prompt would be used again
        for token in islice(self.model.generate(prompt, temp=0.0), new_tokens):
            emit(int(token))


RUNTIMES: dict[str, Callable[[Request], Runtime]] = {
    "sedac": _Sedac,
    "onnxruntime-genai": _OnnxRuntimeGenAi,
    "llama.cpp": _LlamaCpp,
    "transformers": _Transformers,
}


def answer(request: Request) -> Answer:
    """Load the runtime and do what is asked for."""
    begun = time.perf_counter()
    runtime = RUNTIMES[request["runtime"]](request)
    loading = time.perf_counter() - begun
    if "texts" in request:
        assert isinstance(runtime, _Sedac)
        return {"tokens": [runtime.model.encode(text) for text in request["texts"]]}
    if "continuations" in request:
        assert isinstance(runtime, _Sedac | _Transformers)
        return {"agreement": [runtime.judge(*pair) for pair in request["continuations"]]}
    # other tokens than the prompt's: drafts may come from all texts of a process
    warm_up = _timed(runtime, request["prompts"][0][::-1], WARM_UP_TOKENS)
    return {
        "version": version(runtime.distribution),
        "load_s": loading + warm_up["prefill_s"],
        "generations": [
            _timed(runtime, prompt, request["new_tokens"]) for prompt in request["prompts"]
        ],
        "resident_bytes": _resident_bytes(),
    }


def _timed(runtime: Runtime, prompt: list[int], new_tokens: int) -> Answer:
    """Generated tokens, seconds until the first one, and those of the others."""
    tokens: list[int] = []
    times: list[float] = []

    def emit(token: int) -> None:
        times.append(time.perf_counter())
        tokens.append(token)

    begun = time.perf_counter()
    runtime.generate(prompt, new_tokens, emit)
    return {"tokens": tokens, "prefill_s": times[0] - begun, "decode_s": times[-1] - times[0]}


def _equal_share(chosen: list[int], tokens: list[int]) -> float:
    pairs = zip(chosen, tokens, strict=True)
    return sum(mine == theirs for mine, theirs in pairs) / len(tokens)


def _resident_bytes() -> int:
    """Memory of this process that is in RAM, files that it maps included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Answer the request on stdin."""
    # the answer has stdout to itself: libraries print to it too
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        json.dump(answer(json.load(sys.stdin)), output)


if __name__ == "__main__":
    main()
