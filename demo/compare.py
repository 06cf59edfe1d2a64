"""Wall-clock speed of SEDAC and transformers on the same prompts, with agreement beside it.

Prompts are cut from standard-library modules that the demo model was not trained on. The
runtimes take turns on each prompt; the figure is the median over prompts of tokens per second,
prefill included. Agreement is the share of generated tokens that the full-depth model
(transformers, fp32) would have chosen after the same text.

    python demo/compare.py --model demo/model --engines engines/demo
"""

import argparse
import importlib
import inspect
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sedac_runtime import SedacModel

MODULES = ("argparse", "difflib", "tarfile", "zipfile", "typing", "inspect", "json.decoder")
PROMPT_TOKENS = 64

Generate = Callable[[list[int], int], tuple[list[int], float]]


def prompts(model: SedacModel, count: int) -> list[list[int]]:
    """`count` prompts of PROMPT_TOKENS tokens, from the middle of held-out modules."""
    found = []
    for index in range(count):
        text = inspect.getsource(importlib.import_module(MODULES[index % len(MODULES)]))
        start = len(text) * (1 + index // len(MODULES)) // (2 + count // len(MODULES))
        found.append(model.encode(text[start : start + 2000])[:PROMPT_TOKENS])
    return found


def eager(model: PreTrainedModel) -> Generate:
    def generate(prompt: list[int], count: int) -> tuple[list[int], float]:
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return output[0, len(prompt) :].tolist(), float(model.config.num_hidden_layers)

    return generate


def sedac(model: SedacModel, **settings: object) -> Generate:
    def generate(prompt: list[int], count: int) -> tuple[list[int], float]:
        output = model.generate(prompt, max_new_tokens=count, stop_tokens=[], **settings)
        return output.tokens, output.mean_exit_layer

    return generate


@torch.no_grad()
def agreement(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> float:
    """Share of `tokens` that are the argmax of full depth after what precedes them."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return float((logits.argmax(-1) == torch.tensor(tokens)).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=14)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    original = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model = SedacModel.from_pretrained(arguments.engines, threads=arguments.threads)
    ways = {
        "transformers eager": eager(original),
        "SEDAC full depth": sedac(model, mode="full"),
        **{
            f"SEDAC exit, tau {tau} K {k}": sedac(model, mode="exit", tau=tau, consecutive_k=k)
            for tau, k in ((0.99, 3), (0.98, 2), (0.95, 2))
        },
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    depths: dict[str, list[float]] = {name: [] for name in ways}
    agreements: dict[str, list[float]] = {name: [] for name in ways}
    cut = prompts(model, arguments.prompts)
    for prompt in [cut[0], *cut]:  # the first once more: its first time warms up
        for name, generate in ways.items():
            started = time.perf_counter()
            tokens, depth = generate(prompt, arguments.new_tokens)
            speeds[name].append(len(tokens) / (time.perf_counter() - started))
            depths[name].append(depth)
            agreements[name].append(agreement(original, prompt, tokens))
    base = statistics.median(speeds["transformers eager"][1:])
    print("| runtime | tokens/s | against transformers | mean exit layer | agreement |")
    print("| --- | --- | --- | --- | --- |")
    for name in ways:
        speed = statistics.median(speeds[name][1:])
        depth = statistics.mean(depths[name][1:])
        same = 100 * statistics.mean(agreements[name][1:])
        print(f"| {name} | {speed:.0f} | {speed / base:.2f}x | {depth:.1f} | {same:.1f} % |")


if __name__ == "__main__":
    main()
