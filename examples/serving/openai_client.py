"""OpenAI's own client: a completion as it comes, what drafting saved, and the same text without drafts.

specengine serve                                  # or any other server: OPENAI_BASE_URL names it
python examples/serving/openai_client.py
"""

import os

import openai

client = openai.OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
(model,) = client.models.list()
prompt = "def fibonacci(n):\n"

pieces = []
for chunk in client.completions.create(
    model=model.id,
    prompt=prompt,
    max_tokens=48,
    seed=7,
    stream=True,
    stream_options={"include_usage": True},
    extra_body={"num_speculative_tokens": 4},
):
    for choice in chunk.choices:
        print(choice.text, end="", flush=True)
        pieces.append(choice.text)
text = "".join(pieces)
drafts = chunk.metrics["speculative_decoding"]  # the last event's, beside its usage
print(
    f"\n{chunk.usage.completion_tokens} tokens, {drafts['num_accepted_draft_tokens']} of them drafted, "
    f"{drafts['mean_acceptance_length']:.2f} a round"
)

plain = client.completions.create(
    model=model.id, prompt=prompt, max_tokens=48, seed=7, extra_body={"num_speculative_tokens": 0}
)
print("without drafts:", "the same text" if plain.choices[0].text == text else "ANOTHER TEXT")

if model.has_chat_template:
    answer = client.chat.completions.create(
        model=model.id, messages=[{"role": "user", "content": "Name three colours."}], max_tokens=32, seed=7
    )
    print("chat:", answer.choices[0].message.content)

try:
    client.completions.create(model=model.id, prompt=prompt, temperature=-1)
except openai.BadRequestError as error:
    print("refused:", error.body["message"])
