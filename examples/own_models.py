"""Two models of your own: a directory in the Hugging Face format or a name on the Hub for each.

    python examples/own_models.py --model gpt2-medium --draft-model distilgpt2 --prompt "The future of AI is"

Without arguments it takes the bundled pair, by its directories.
"""

import argparse

from specengine import Engine, SamplingParams, bundled

parser = argparse.ArgumentParser(description="Generate with a target and a draft.")
parser.add_argument("--model", default=str(bundled.target_path()))
parser.add_argument("--draft-model", default=str(bundled.draft_path()))
parser.add_argument("--prompt", default="class Stack:\n")
parser.add_argument("--num-speculative-tokens", type=int, default=4)
options = parser.parse_args()

# An int8 draft reads less, and changes nothing of what is written.
with Engine(options.model, options.draft_model, draft_weight_dtype="int8") as engine:
    for k in (0, options.num_speculative_tokens):
        params = SamplingParams(max_new_tokens=48, num_speculative_tokens=k)
        result = engine.generate(options.prompt, params)
        print(f"k = {k}: {result.metrics.num_target_forwards} forwards of the target")
print(result.text)
