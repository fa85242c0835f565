"""What does not change: the bits of greedy output, and the text of a seed.

    python examples/seeds_and_exactness.py

The last part shows a mode that is not exact, and how the result says so.
"""

import warnings

from specengine import Engine, SamplingParams, bundled

PROMPT = "def read_config(path, encoding='utf-8'):\n"


def tokens_and_bits(result):
    """Ids, and log-probabilities as they are, unrounded."""
    return result.token_ids, [entry.logprob for entry in result.outputs[0].logprobs]


with Engine(bundled.target_path(), bundled.draft_path()) as engine:

    def run(**fields):
        return engine.generate(PROMPT, SamplingParams(max_new_tokens=40, logprobs=0, **fields))

    for name, sampling in {"greedy": {}, "seed 7": {"temperature": 0.8, "seed": 7}}.items():
        plain = run(num_speculative_tokens=0, **sampling)
        for k in (1, 4, 8):
            fast = run(num_speculative_tokens=k, **sampling)
            assert tokens_and_bits(fast) == tokens_and_bits(plain)
        print(f"{name}: the same bits with k = 0, 1, 4 and 8")

    texts = {run(temperature=0.8, seed=seed).text for seed in range(4)}
    print(f"4 seeds: {len(texts)} texts")

    drawn = run(temperature=0.8, num_speculative_tokens=4)  # no seed: one is drawn, and reported
    print(f"without a seed: lossless {drawn.lossless}, seed reported {drawn.seed is not None}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that this is lossy
        lossy = run(temperature=0.8, seed=7, num_speculative_tokens=4, acceptance="threshold")
    print(f"acceptance='threshold': lossless {lossy.lossless}")
