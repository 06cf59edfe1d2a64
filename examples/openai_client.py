"""Stream a completion in exit mode from `sedac-runtime serve` with OpenAI's client.

sedac-runtime serve engines/demo
python examples/openai_client.py http://127.0.0.1:8000 demo "def main():"
"""

import sys

from openai import OpenAI

url, model, prompt = sys.argv[1:]
client = OpenAI(base_url=f"{url}/v1", api_key="any, unless the server has one")
stream = client.completions.create(
    model=model,
    prompt=prompt,
    max_tokens=64,
    temperature=0,
    stream=True,
    # what OpenAI's API lacks; without it the answer is any other server's
    extra_body={"sedac": {"mode": "exit"}},
)
layers = []
print(prompt, end="")
for event in stream:
    choice = event.choices[0]
    print(choice.text, end="", flush=True)
    layers += [token["exit_layer"] for token in choice.model_extra["sedac"]["tokens"]]
print(f"\nmean exit layer {sum(layers) / len(layers):.1f}", file=sys.stderr)
