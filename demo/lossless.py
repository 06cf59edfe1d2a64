"""Wall-clock speed of lossless mode over the same bundle's full depth, and whether tokens differ.

Prompts are cut at random from standard-library packages that the demo model was not trained on.
Full depth and the drafters take turns on each prompt, in random order. Speeds are full depth's
decoding time over a drafter's: of all prompts together, and the median and minimum of single
prompts. A text differs if any of its tokens does.

    python demo/lossless.py --engines engines/demo
"""

import argparse
import json
import random
import statistics
import sysconfig
from pathlib import Path

from sedac_runtime import GenerationOutput, SedacModel

PACKAGES = (
    *("argparse", "asyncio", "difflib", "email", "http", "inspect", "json", "logging"),
    *("tarfile", "typing", "unittest", "zipfile"),
)
DRAFTERS = ("early-exit", "prompt-lookup", "auto")
CUT = 3000


def prompts(model: SedacModel, count: int, tokens: int) -> list[list[int]]:
    """`count` prompts of `tokens` tokens each."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for package in PACKAGES
        for path in (library / f"{package}.py", *(library / package).rglob("*.py"))
        if path.exists() and path.stat().st_size > 2 * CUT
    ]
    choose = random.Random(0)
    found = []
    for _ in range(count):
        text = choose.choice(sorted(files)).read_text(encoding="utf-8", errors="ignore")
        start = choose.randrange(len(text) - CUT)
        found.append(model.encode(text[start : start + CUT])[:tokens])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    model = SedacModel.from_pretrained(arguments.engines, threads=arguments.threads)

    def run(way: str, prompt: list[int], seed: int) -> GenerationOutput:
        mode = {"mode": "full"} if way == "full" else {"mode": "lossless", "drafter": way}
        # drafts come from this text alone, as in a process of its own
        model.core.forget_texts()
        return model.generate(
            prompt,
            max_new_tokens=arguments.new_tokens,
            stop_tokens=[],
            temperature=arguments.temperature,
            seed=seed,
            **mode,
        )

    manifest = json.loads((arguments.engines / "bundle.json").read_text())
    trained = ["trained"] if manifest.get("drafter") else []
    ways = ["full", *DRAFTERS, *trained]
    outputs: dict[str, list[GenerationOutput]] = {way: [] for way in ways}
    order = random.Random(1)
    cut = prompts(model, arguments.prompts, arguments.prompt_tokens)
    run("full", cut[0], 0)  # warms up
    for seed, prompt in enumerate(cut):
        for way in order.sample(ways, len(ways)):
            outputs[way].append(run(way, prompt, seed))
    full = outputs["full"]
    per_token = sum(output.decode_ms for output in full) / len(full) / (arguments.new_tokens - 1)
    print(f"{len(cut)} prompts, full depth {per_token:.3f} ms/token\n")
    print("| drafter | speed | median | minimum | drafted | accepted | texts that differ |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for way in ways[1:]:
        pairs = list(zip(full, outputs[way], strict=True))
        ratios = [theirs.decode_ms / ours.decode_ms for theirs, ours in pairs]
        total = sum(theirs.decode_ms for theirs, _ in pairs)
        speed = total / sum(ours.decode_ms for _, ours in pairs)
        drafted, accepted = (
            sum(getattr(ours, name) for _, ours in pairs) for name in ("drafted", "accepted")
        )
        differ = sum(theirs.tokens != ours.tokens for theirs, ours in pairs)
        print(
            f"| {way} | {speed:.2f}x | {statistics.median(ratios):.2f}x | {min(ratios):.2f}x |"
            f" {drafted} | {accepted} | {differ} |"
        )


if __name__ == "__main__":
    main()
