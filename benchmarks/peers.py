"""SEDAC beside other runtimes on SmolLM2-135M-Instruct, in fp32, fp16 and int4, on chat and code.

Prints a table for each: what `sedac-runtime bench --against` measures, over three prompts. The
weights come from a Q4_1 file: beside int4 llama.cpp runs it as it is, else dequantized to fp32.
Beside fp16 peers have their weights in fp32, too: all compute in it.

    make benchmark
"""

import argparse
from pathlib import Path

from smollm2 import SmolLM2
from transformers import AutoTokenizer

from sedac_export.bundle.manifest import Precision
from sedac_runtime import bench_peers
from sedac_runtime.bench_table import markdown_table
from sedac_runtime.peer_models import PEERS, genai_model

# by precision of SEDAC's weights that of the others'
PEERS_PRECISION: dict[Precision, Precision] = {"fp32": "fp32", "fp16": "fp32", "int4": "int4"}
PRECISIONS = tuple(PEERS_PRECISION)

CHAT = (
    "Explain photosynthesis to a ten-year-old.",
    "Give me a recipe for pancakes with quantities in grams.",
    "Name three differences between TCP and UDP and explain each of them.",
)
CODE = (
    "def reverse_linked_list(head):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import argparse\n\ndef parse_arguments():\n    parser = argparse.ArgumentParser()\n",
)


def encode(checkpoint: Path) -> dict[str, list[list[int]]]:
    """Token ids of the prompts, by kind."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    chats = [[{"role": "user", "content": text}] for text in CHAT]
    return {
        "chat": [
            list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
            for chat in chats
        ],
        "code": [tokenizer(text)["input_ids"] for text in CODE],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("target/benchmark"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    model = SmolLM2(arguments.directory)
    checkpoint = str(model.checkpoint())
    for precision in arguments.precisions:
        bundle, peers_precision = model.bundle(precision), PEERS_PRECISION[precision]
        built = arguments.directory / f"genai-{peers_precision}"
        if not built.exists():
            genai_model(model.bundle(peers_precision), checkpoint, built)
        gguf_file = model.fp32_gguf_file() if peers_precision == "fp32" else model.gguf_file
        models = {
            "onnxruntime-genai": str(built / "model"),
            "llama.cpp": str(gguf_file),
            "transformers": checkpoint,
        }
        for kind, prompts in encode(model.checkpoint()).items():
            rows = bench_peers(
                bundle,
                PEERS,
                peer_models=models,
                drafters=["auto"],
                prompts=prompts,
                new_tokens=arguments.new_tokens,
                repeat=arguments.rounds,
                threads=arguments.threads,
            )
            print(f"\n{precision}, {kind}:\n\n{markdown_table(rows)}", flush=True)


if __name__ == "__main__":
    main()
