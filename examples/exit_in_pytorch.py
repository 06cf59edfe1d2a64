"""Early exit inside a transformers model, without exporting it: which layers do tokens need?

python examples/exit_in_pytorch.py demo/model "def main():"
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from sedac_export import create_universal_accelerator

directory, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
inputs = tokenizer(prompt, return_tensors="pt")
for tau in (0.99, 0.98, 0.95):
    with create_universal_accelerator(model, tau=tau, consecutive_k=2) as accelerator:
        tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0)
        depth = accelerator.stats().mean_exit_layer
    print(f"tau {tau}: mean exit layer {depth:.1f}, {tokenizer.decode(tokens[0])!r}")
