"""Several prompts at once, each with parameters of its own.

    python examples/batch.py

A request's text does not depend on what else is in the batch: each is what it would be alone.
"""

from specengine import Engine, SamplingParams, bundled

REQUESTS = {
    "import os\n": SamplingParams(max_new_tokens=20),
    "class Stack:\n": SamplingParams(max_new_tokens=40, temperature=0.8, top_p=0.95, seed=7),
    "def read(path):\n": SamplingParams(max_new_tokens=40, stop=["\n\n"], num_speculative_tokens=6),
    "# A list of numbers\n": SamplingParams(max_new_tokens=12, temperature=1.0, n=2, seed=3, logprobs=2),
}

with Engine(bundled.target_path(), bundled.draft_path()) as engine:
    together = engine.generate(list(REQUESTS), list(REQUESTS.values()))
    alone = [engine.generate(prompt, params) for prompt, params in REQUESTS.items()]

for result, single in zip(together, alone, strict=True):
    print(f"{result.prompt!r}: {result.metrics.num_generated_tokens} tokens, ends by {result.finish_reason}")
    for output, same in zip(result.outputs, single.outputs, strict=True):
        print(f"    {output.text!r}")
        assert output.token_ids == same.token_ids
print("each is the same alone")
