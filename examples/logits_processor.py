"""A function that changes logits: here, no token that stood among the last twelve comes again.

    python examples/logits_processor.py

It is called once for each token, in order, with the true text before it: never with a draft that is rejected later.
So a processor may count, or keep a state, as it would in plain decoding.
"""

from specengine import Engine, SamplingParams, bundled

WINDOW, NEW_TOKENS = 12, 40
lengths = []


def nothing_twice(token_ids, logits):
    """token_ids: all so far, the prompt's included; logits: `[vocabulary]`, fp32. Returns logits."""
    lengths.append(len(token_ids))
    logits[token_ids[-WINDOW:]] = float("-inf")
    return logits


with Engine(bundled.target_path(), bundled.draft_path()) as engine:
    params = {"max_new_tokens": NEW_TOKENS, "num_speculative_tokens": 4, "ignore_eos": True}
    free = engine.generate("x = max(", SamplingParams(**params))
    changed = engine.generate("x = max(", SamplingParams(logits_processor=nothing_twice, **params))

print(f"without: {free.text!r}")
print(f"with:    {changed.text!r}")
print("---")
assert lengths == list(range(lengths[0], lengths[0] + NEW_TOKENS)), "once for each token, in order"
ids = changed.token_ids
assert all(token not in ids[max(0, at - WINDOW) : at] for at, token in enumerate(ids))
drafts = changed.metrics.speculative_decoding
print(f"{len(lengths)} calls for {len(ids)} tokens, {drafts.num_accepted_draft_tokens} of them drafted")
