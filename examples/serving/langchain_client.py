"""LangChain on a served model: a chain, several prompts at once, a stream; with drafts and without, the same.

pip install langchain-openai
specengine serve                                  # or any other server: OPENAI_BASE_URL names it
python examples/serving/langchain_client.py
"""

import os

import openai
from langchain_core.prompts import PromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

server = {
    "base_url": os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    "api_key": os.environ.get("OPENAI_API_KEY", "none"),
}
(model,) = openai.OpenAI(**server).models.list()


def writer(k: int) -> OpenAI:
    """Completes texts, with so many drafts a round."""
    return OpenAI(model=model.id, max_tokens=24, seed=7, extra_body={"num_speculative_tokens": k}, **server)


chain = PromptTemplate.from_template("def {name}(values):\n") | writer(4)
names = [{"name": "mean"}, {"name": "variance"}]
texts = chain.batch(names)
print(*texts, sep="\n---\n")

plain = (chain.first | writer(0)).batch(names)
print("without drafts:", "the same texts" if plain == texts else "OTHER TEXTS")

streamed = list(chain.stream(names[0]))
print("streamed:", "the same text" if "".join(streamed) == texts[0] else "ANOTHER TEXT")

if model.has_chat_template:
    chat = ChatOpenAI(
        model=model.id, max_tokens=24, seed=7, extra_body={"num_speculative_tokens": 4}, **server
    )
    answer = chat.invoke([("system", "Be brief."), ("human", "Name three colours.")])
    print("chat:", answer.text, answer.usage_metadata)
    pieces = [
        piece.text for piece in chat.stream([("system", "Be brief."), ("human", "Name three colours.")])
    ]
    print("streamed chat:", "the same text" if "".join(pieces) == answer.text else "ANOTHER TEXT")
