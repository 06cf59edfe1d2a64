"""Wall-clock speed and agreement of exits, with and without drafters, and of lossless mode.

Prompts are those of demo/lossless.py. Setups of mode and drafter take turns on each prompt, in
random order, greedily. Speeds are full depth's decoding time over a setup's, of all prompts
together. Agreement is the share of generated tokens that full depth would have chosen after the
same text.

    python demo/exits.py --engines engines/demo
"""

import argparse
from pathlib import Path

from lossless import prompts

from sedac_export.bundle import Bundle
from sedac_export.bundle.exit_config import read_exit_config
from sedac_export.exits.calibration import generation_speed as generation
from sedac_export.exits.calibration.generation_speed import (
    FULL,
    agreement,
    decoding_setups,
    time_setups,
)
from sedac_export.exits.replay.replay import Replay
from sedac_runtime import SedacModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    arguments = parser.parse_args()
    model = SedacModel.from_pretrained(arguments.engines, threads=generation.THREADS)
    cut = prompts(model, arguments.prompts, arguments.prompt_tokens)
    runs = time_setups(arguments.engines, decoding_setups(read_exit_config(arguments.engines)), cut)
    replay = Replay(Bundle.open(arguments.engines))
    full = runs[FULL].milliseconds
    per_token = full / len(cut) / (generation.NEW_TOKENS - 1)
    print(f"{len(cut)} prompts, full depth {per_token:.3f} ms/token\n")
    print("| mode | drafter | speed | agreement |")
    print("| --- | --- | --- | --- |")
    for (mode, drafter), run in runs.items():
        share = agreement(replay, run.texts)
        print(f"| {mode} | {drafter} | {full / run.milliseconds:.2f}x | {share:.2%} |")


if __name__ == "__main__":
    main()
