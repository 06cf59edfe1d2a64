"""Compare the modes on one prompt: speed, layers, and whether the text is full depth's.

python examples/compare_modes.py engines/demo "def main():"
"""

import sys

from sedac_runtime import SedacModel

MODES = ("full", "lossless", "exit")

bundle, prompt = sys.argv[1:]
model = SedacModel.from_pretrained(bundle, threads=2)
# in turns, so that whatever else the machine does affects all modes alike
rounds = [
    {mode: model.generate(prompt, mode=mode, max_new_tokens=64) for mode in MODES} for _ in range(4)
]
full = rounds[0]["full"]
print("mode        tokens/s  mean exit layer  text")
for mode in MODES:
    output = rounds[0][mode]
    speed = max(each[mode].decode_tokens_per_second for each in rounds)
    same = "full depth's" if output.tokens == full.tokens else "differs"
    print(f"{mode:10} {speed:9.0f} {output.mean_exit_layer:16.1f}  {same}")
