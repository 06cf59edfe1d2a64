"""Compare the modes on one prompt: speed, layers, and whether the text is full depth's.

python examples/compare_modes.py engines/demo "def main():"
"""

import sys

from sedac_runtime import SedacModel

bundle, prompt = sys.argv[1:]
model = SedacModel.from_pretrained(bundle, threads=2)
model.generate(prompt, max_new_tokens=8)  # warms up
full = model.generate(prompt, mode="full", max_new_tokens=64)
print("mode        speedup  mean exit layer  text")
for mode in ("full", "lossless", "exit"):
    output = model.generate(prompt, mode=mode, max_new_tokens=64)
    speedup = output.decode_tokens_per_second / full.decode_tokens_per_second
    same = "full depth's" if output.tokens == full.tokens else "differs"
    print(f"{mode:10} {speedup:7.2f}x {output.mean_exit_layer:16.1f}  {same}")
