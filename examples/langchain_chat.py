"""Chat with a bundle that has a chat template, through LangChain.

sedac-runtime serve engines/smollm2
python examples/langchain_chat.py http://127.0.0.1:8000 smollm2 "Name three colours."
"""

import sys

from langchain_openai import ChatOpenAI

url, model, question = sys.argv[1:]
chat = ChatOpenAI(
    model=model,
    base_url=f"{url}/v1",
    api_key="any, unless the server has one",
    temperature=0,
    max_tokens=64,
)
for chunk in chat.stream([("system", "Answer briefly."), ("human", question)]):
    print(chunk.content, end="", flush=True)
print()
