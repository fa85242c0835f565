"""The shortest program: complete a prompt, and see what speculation did.

python examples/quickstart.py
"""

import specengine

result = specengine.generate("def binary_search(items, x):", max_new_tokens=60, num_speculative_tokens=4)
print(result.text)

metrics = result.metrics
drafts = metrics.speculative_decoding
print("---")
print(f"{metrics.num_generated_tokens} tokens in {metrics.num_target_forwards} forwards of the target")
print(f"{drafts.draft_acceptance_rate:.0%} of the drafted tokens were accepted")
print(f"{drafts.mean_acceptance_length:.2f} tokens a round")
