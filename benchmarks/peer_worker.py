"""One runtime in a process of its own: reads prompts as JSON lines, answers with tokens and times.

    python benchmarks/peer_worker.py RUNTIME PATH THREADS

A request holds `prompt` (token ids), `new_tokens` and `mode` (SEDAC's), or `prompt` and `tokens`,
which transformers judges. Times are in seconds: `prefill` until the first token, `decode` for the
other new_tokens - 1.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Request = dict[str, Any]
Answer = dict[str, Any]
Handle = Callable[[Request], Answer]


def timed(start: Callable[[list[int], int], Iterator[int]]) -> Handle:
    """Time a greedy token iterator: the first token is the prefill, the others the decoding."""

    def handle(request: Request) -> Answer:
        begun = time.perf_counter()
        tokens = start(request["prompt"], request["new_tokens"])
        generated = [int(next(tokens))]
        first = time.perf_counter()
        generated += [int(next(tokens)) for _ in range(request["new_tokens"] - 1)]
        ended = time.perf_counter()
        return {"tokens": generated, "prefill": first - begun, "decode": ended - first}

    return handle


def load_transformers(path: str, threads: int) -> Handle:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    class Clock:
        """A streamer that notes when each token comes."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _: object) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None: ...

    def generate(request: Request) -> Answer:
        ids, clock = torch.tensor([request["prompt"]]), Clock()
        begun = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request["new_tokens"],
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
        _, first, *_, last = clock.times  # the prompt's comes before the tokens'
        return {
            "tokens": output[0, ids.shape[1] :].tolist(),
            "prefill": first - begun,
            "decode": last - first,
        }

    @torch.no_grad()
    def judge(prompt: list[int], tokens: list[int]) -> Answer:
        """The share of `tokens` that are the argmax after what precedes them."""
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        return {"agreement": float((logits.argmax(-1) == torch.tensor(tokens)).float().mean())}

    return lambda request: (
        judge(request["prompt"], request["tokens"]) if "tokens" in request else generate(request)
    )


def load_genai(path: str, _: int) -> Handle:
    import onnxruntime_genai

    model = onnxruntime_genai.Model(path)  # its configuration holds the threads

    def start(prompt: list[int], new_tokens: int) -> Iterator[int]:
        options = onnxruntime_genai.GeneratorParams(model)
        options.set_search_options(max_length=len(prompt) + new_tokens, do_sample=False)
        generator = onnxruntime_genai.Generator(model, options)
        generator.append_tokens(prompt)
        while True:
            generator.generate_next_token()
            yield generator.get_next_tokens()[0]

    return timed(start)


def load_llama_cpp(path: str, threads: int) -> Handle:
    from llama_cpp import Llama

    model = Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def start(prompt: list[int], _: int) -> Iterator[int]:
        model.reset()  # otherwise the cache of an equal prompt would be used again
        return model.generate(prompt, temp=0.0)

    return timed(start)


def load_sedac(path: str, threads: int) -> Handle:
    from sedac_runtime import SedacModel

    model = SedacModel.from_pretrained(path, threads=threads)

    def handle(request: Request) -> Answer:
        output = model.generate(
            request["prompt"],
            mode=request["mode"],
            max_new_tokens=request["new_tokens"],
            stop_tokens=[],
        )
        return {
            "tokens": output.tokens,
            "prefill": output.prefill_ms / 1e3,
            "decode": output.decode_ms / 1e3,
        }

    return handle


LOADERS = {
    "transformers": load_transformers,
    "genai-fp32": load_genai,
    "genai-int4": load_genai,
    "llama.cpp": load_llama_cpp,
    "sedac": load_sedac,
}


def main() -> None:
    runtime, path, threads = sys.argv[1:]
    # answers have stdout to themselves: libraries print to it too
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    handle = LOADERS[runtime](path, int(threads))
    for line in sys.stdin:
        print(json.dumps(handle(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
