"""One runtime on the GPU in a process of its own, with random fp16 weights of one shape.

    python benchmarks/gpu_worker.py RUNTIME SHAPE DIRECTORY

The first line on stdout says {"ready": true}, or why not: {"error": ...}. Then every line of stdin
asks for a number of passes, {"passes": 50}, and the answer has the microseconds of each, from its
launch to its token on the host. Of SEDAC's kernel "rows", "layers" and "position" may be asked for.
With {"passes": 50, "prompt": 512} a pass is the first token after a prompt of so many, with
{"passes": 50, "sequences": 32} a token of each of so many texts.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chain_cases import MODELS
from chain_decoder import ChainCase
from kernel_check import TOKENS
from torch import Tensor

Handle = Callable[[dict[str, Any]], list[float]]
Step = Callable[[], None]

CAPACITY, LONG_CAPACITY = 1024, 4096
# tokens before those that are timed, which come to lie around position 511
PROMPT = 416
WARM_UP = 16
# texts that are decoded together, at most
SEQUENCES = 32


def load_sedac(case: ChainCase, _: Path, slots: int = SEQUENCES) -> Handle:
    from chain_launcher import ChainLauncher, SequenceInput, card_architecture, compile_chain

    from sedac_export.cuda.chain_abi import BATCH_ROWS, BatchRow
    from sedac_export.cuda.compiler import Compiler

    launcher = ChainLauncher(case, compile_chain(Compiler(), case, card_architecture()), slots)
    filled = 0

    def first_token(prompt: int) -> Step:
        """The last token's pass after a prefill, whose kernels Python launches too slowly."""
        starts = range(0, prompt - 1, BATCH_ROWS)
        pieces = [range(start, min(start + BATCH_ROWS, prompt - 1)) for start in starts]
        graphs = [launcher.captured(launcher.make_prefill(p, p.start)) for p in pieces]
        last = launcher.make_pass([SequenceInput.of_tokens(TOKENS[:1], prompt - 1)])

        def step() -> None:
            for graph in graphs:
                graph.replay()
            torch.cuda.synchronize()
            launcher.launch(last)
            torch.cuda.synchronize()

        return step

    @functools.cache
    def together(sequences: int) -> Step:
        """A batch of a row of each, which the runtime launches without a graph."""
        for slot in range(1, sequences):
            launcher.fill(slot, case.position)
        token = TOKENS[0]
        rows = [BatchRow(token, case.position, slot) for slot in range(sequences)]
        graph = launcher.captured(launcher.make_batch(rows, range(sequences)))

        def step() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return step

    def handle(request: dict[str, Any]) -> list[float]:
        nonlocal filled
        if prompt := request.get("prompt"):
            filled = 0
            return timed(first_token(prompt), request["passes"])
        if sequences := request.get("sequences"):
            return timed(together(sequences), 1 + request["passes"])[1:]
        position = request.get("position", case.position)
        if filled < position:
            launcher.fill(0, position)
            filled = position
        count, layers = request.get("rows", 1), request.get("layers", case.shape.layers)
        rows = [(token, position + row, 0) for row, token in enumerate(TOKENS[:count])]
        wanted = launcher.make_pass([SequenceInput(rows, max_depth=layers)])

        def step() -> None:
            launcher.launch(wanted)
            torch.cuda.synchronize()

        return timed(step, request["passes"])

    return handle


def load_long(case: ChainCase, directory: Path) -> Handle:
    """Caches that hold more."""
    return load_sedac(dataclasses.replace(case, capacity=LONG_CAPACITY), directory, slots=1)


def load_transformers(case: ChainCase, _: Path, device: str = "cuda") -> Handle:
    from transformers import StaticCache

    from sedac_export.model.decoder import cache_argument

    model = random_model(case, device)
    argument = cache_argument(inspect.signature(model.forward).parameters)
    options = {"mode": "reduce-overhead", "dynamic": False}
    forward = torch.compile(model.forward, **options) if device == "cuda" else model

    def decoding(sequences: int) -> Step:
        cache = StaticCache(config=model.config, max_cache_len=CAPACITY)

        @torch.no_grad()
        def next_token(run: Callable[..., Any], tokens: Tensor, positions: Tensor) -> Tensor:
            settings = {argument: cache, "use_cache": True}
            logits = run(input_ids=tokens, position_ids=positions, **settings).logits
            return logits[:, -1:].argmax(-1)

        prompt = torch.arange(PROMPT, device=device).expand(sequences, -1)
        position = torch.full((sequences, 1), PROMPT, device=device)
        token = next_token(model, prompt % case.shape.vocabulary, prompt)

        def step() -> None:
            nonlocal token
            torch.compiler.cudagraph_mark_step_begin()
            token = next_token(forward, token, position)
            position.add_(1)
            token.tolist()

        return step

    @torch.no_grad()
    def first_token(length: int) -> None:
        tokens = torch.arange(length, device=device)[None] % case.shape.vocabulary
        model(input_ids=tokens, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()

    return counted(decoding, first_token)


def load_genai(case: ChainCase, directory: Path, device: str = "cuda") -> Handle:
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise RuntimeError("not installed: pip install onnxruntime-genai-cuda") from error

    if device == "cuda" and not onnxruntime_genai.is_cuda_available():
        raise RuntimeError("installed without CUDA: pip install onnxruntime-genai-cuda")
    model = onnxruntime_genai.Model(str(built_genai(case, directory, device)))

    def generator(length: int, sequences: int) -> Any:
        """Of so many texts, behind a prompt of `length` tokens."""
        options = onnxruntime_genai.GeneratorParams(model)
        options.set_search_options(max_length=CAPACITY, do_sample=False, batch_size=sequences)
        made = onnxruntime_genai.Generator(model, options)
        prompt = np.arange(length, dtype=np.int32) % case.shape.vocabulary
        made.append_tokens(np.tile(prompt, (sequences, 1)))
        return made

    def decoding(sequences: int) -> Step:
        decoded = generator(PROMPT, sequences)
        return lambda: next_tokens(decoded)

    def next_tokens(decoded: Any) -> None:
        decoded.generate_next_token()
        int(decoded.get_next_tokens()[0])

    return counted(decoding, lambda length: next_tokens(generator(length, 1)))


LOADERS: dict[str, Callable[[ChainCase, Path], Handle]] = {
    "sedac": load_sedac,
    "sedac-long": load_long,
    "transformers": load_transformers,
    "onnxruntime-genai": load_genai,
}


def counted(decoding: Callable[[int], Step], first_token: Callable[[int], None]) -> Handle:
    """Runs what `decoding` makes for so many texts, or `first_token` of a prompt's length."""

    @functools.cache
    def warmed(sequences: int) -> Step:
        step = decoding(sequences)
        timed(step, WARM_UP)
        return step

    warmed(1)

    def handle(request: dict[str, Any]) -> list[float]:
        prompt, passes = request.get("prompt"), request["passes"]
        if prompt is None:
            return timed(warmed(request.get("sequences", 1)), passes)
        return timed(lambda: first_token(prompt), 1 + passes)[1:]

    return handle


def timed(step: Step, passes: int) -> list[float]:
    """Microseconds of each pass."""
    times = []
    for _ in range(passes):
        start = time.perf_counter()
        step()
        times.append(1e6 * (time.perf_counter() - start))
    return times


def random_model(case: ChainCase, device: str) -> Any:
    """A transformers model of the case's shape, which is Qwen 2's architecture, in fp16."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = case.shape
    config = Qwen2Config(
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocabulary,
        max_position_embeddings=LONG_CAPACITY,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=shape.vocabulary - 1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()


def built_genai(case: ChainCase, directory: Path, device: str) -> Path:
    """The directory of the model in genai's own form, made by its builder."""
    target, checkpoint = directory / "genai", directory / "checkpoint"
    if target.exists():
        return target
    random_model(case, device).save_pretrained(checkpoint)
    save_tokenizer(checkpoint)
    subprocess.run(
        [
            *(sys.executable, "-m", "onnxruntime_genai.models.builder"),
            *("-i", checkpoint, "-o", target, "-c", directory / "cache"),
            *("-p", "fp16" if device == "cuda" else "fp32", "-e", device),
        ],
        check=True,
    )
    never_end(target / "genai_config.json", case.shape.vocabulary - 1)
    return target


def save_tokenizer(checkpoint: Path) -> None:
    """The builder copies one; nothing is asked of it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(checkpoint)


def never_end(file: Path, token: int) -> None:
    """Leave a single token that ends a text, which random weights hardly choose."""
    config = json.loads(file.read_text())
    config["model"]["eos_token_id"] = token
    file.write_text(json.dumps(config, indent=2))


@contextlib.contextmanager
def own_stdout() -> Iterator[Callable[[Any], None]]:
    """What answers: libraries print to stdout too, which becomes stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    yield lambda answer: print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    runtime, name, directory = sys.argv[1:]
    case = next(case for case in MODELS if case.name == name)
    with own_stdout() as answer:
        try:
            handle = LOADERS[runtime](case, Path(directory))
        except Exception as error:  # whatever a peer fails with is its row
            answer({"error": next(iter(str(error).splitlines()), type(error).__name__)})
            raise
        answer({"ready": True})
        for line in sys.stdin:
            answer(handle(json.loads(line)))


if __name__ == "__main__":
    main()
