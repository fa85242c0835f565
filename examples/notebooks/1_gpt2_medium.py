# %% [markdown]
# # 1. How many drafts? gpt2 → gpt2-medium
#
# Speculative decoding lets a small *draft* model guess the next `k` tokens and has the large *target* model check them
# all in one forward. How many guesses are worth their time? This repeats a lab notebook's experiment: one text of 60
# tokens, with `k` = 1, 2, 3, 4, 5, 8 and 10, and the table **K, time, target passes, average accepted**.

# %%
import common
from common import Table, show, size

from specengine import Engine
from specengine.measure import figures
from specengine.measure.statistics import ratio_interval
from specengine.measure.theory import conditional_acceptances, speed_up

pair = common.find_pair("gpt2-medium", "gpt2")
pair

# %%
KS = [1, 2, 3, 4, 5, 8, 10]
NUM_TOKENS = size(60, 24)
REPEATS = size(5, 1)
PROMPT = pair.prompts[0]

# Every text begins from nothing: no prompt is remembered from the run before.
# The draft's weights are kept in int8 on a CPU: drafts get cheaper, and the text stays the target's to the bit.
engine = Engine(
    pair.target,
    pair.draft,
    dtype="bfloat16",
    draft_weight_dtype=common.int8_on_cpu(),
    enable_prefix_cache=False,
)


def generate(k):
    """60 tokens, greedy. `k` = 0 is plain decoding: the target alone."""
    return engine.generate(PROMPT, num_speculative_tokens=k, max_new_tokens=NUM_TOKENS, ignore_eos=True)


# %% [markdown]
# ## One text
#
# A result shows itself: the tokens that the draft guessed right, and those that the target had to say itself.

# %%
generate(4)

# %% [markdown]
# ## The table
#
# Every `k` takes its turn in every repeat, plain decoding among them, so that a moment in which the machine was slow
# hits all of them alike. Times are medians; behind the speed-up stands the interval in which its median lies with 95 %.

# %%
runs = common.take_turns({k: lambda k=k: generate(k) for k in [0, *KS]}, REPEATS)
plain = runs[0]

# The claim that everything rests on: whatever was drafted, the text is the target's own, token by token.
assert all(result.token_ids == plain[0].token_ids for results in runs.values() for result in results)

rows = []
for k, results in runs.items():
    speculation = results[0].metrics.speculative_decoding
    gain, low, high = ratio_interval(common.seconds(plain), common.seconds(results))
    rows.append(
        (
            k or "plain",
            common.with_interval(common.seconds(results), 3),
            results[0].metrics.num_target_forwards,
            f"{speculation.mean_acceptance_length - 1:.2f}" if k else "–",
            f"{speculation.draft_acceptance_rate:.0%}" if k else "–",
            f"{gain:.2f}× ({low:.2f} … {high:.2f})",
            f"{1 - 1 / gain:+.0%}",
        )
    )
Table(
    ["K", "time, s", "target passes", "average accepted", "acceptance", "speed-up", "latency reduction"], rows
)

# %% [markdown]
# ## How many target passes?
#
# 60 tokens take 60 passes in plain decoding: one over the prompt, which gives the first token, and one for each further
# token. With `k` drafts a pass gives 1 to `k + 1` tokens.

# %%
forwards = {k: [result.metrics.num_target_forwards for result in runs[k]] for k in KS}
show(figures.forwards_by_k(forwards, NUM_TOKENS))

# %%
accepted = {
    k: [result.metrics.speculative_decoding.mean_acceptance_length - 1 for result in runs[k]] for k in KS
}
show(figures.accepted_by_k(accepted))

# %% [markdown]
# ## How much time?
#
# Passes fall with every further draft, time does not: drafts are made one after another, and each costs a step of the
# draft model, also the ones that nobody wanted.

# %%
show(figures.time_by_k({k: common.seconds(results) for k, results in runs.items()}))

# %%
speed_ups = {
    k: [before / now for before, now in zip(common.seconds(plain), common.seconds(runs[k]), strict=False)]
    for k in KS
}
show(figures.throughput_by_k({0.0: speed_ups}))

# %%
show(
    figures.bars_by_prompt(
        {f"k = {k}": {"saved": [1 - 1 / gain for gain in speed_ups[k]]} for k in KS},
        "latency reduction",
        by="k",
    )
)

# %% [markdown]
# ## Why: the trade-off as a formula
#
# With `c` the time of a draft step and `v` the time of a verification, both in plain passes of the target, and `α` the
# chance that a draft is accepted when all before it were, a round gives `E = 1 + α + α² + … + α^k` tokens on average
# and takes `k·c + v`. The speed-up is `E / (k·c + v)`. Here `c` and `v` are fitted to the times above, and the large
# marks are the measured runs.

# %%
costs = common.fit_costs(plain, {k: runs[k] for k in KS})
measured = [common.measured_point(k, plain, runs[k]) for k in KS]
print(f"c = {costs.draft:.3f}, v = {costs.verify:.2f} plain passes")
show(figures.speed_up_by_k([0.6, 0.7, 0.8, 0.9], costs, measured, max_k=12))

# %%
# The last rounds, at the largest k: does the draft get worse the further it guesses?
counts = runs[KS[-1]][0].metrics.speculative_decoding
show(
    figures.acceptance_by_position(
        counts.num_drafted_by_position, counts.num_accepted_by_position, counts.rejection_positions
    )
)
by_position = conditional_acceptances(counts.num_accepted_by_position, counts.rejection_positions)
print(
    "speed-up by the formula, from these:",
    f"{speed_up(by_position, costs):.2f} with {len(by_position)} drafts",
)

# %% [markdown]
# ## Without choosing `k`
#
# The engine measures `c`, `v` and the acceptance itself, and chooses `k` before every round.

# %%
auto = engine.generate(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True, return_rounds=True)
assert auto.token_ids == plain[0].token_ids
show(figures.k_over_time({"auto": [each.num_draft_tokens for each in auto.outputs[0].rounds]}))

# %%
engine.close()

# %% [markdown]
# ## What the original got wrong
#
# The original's table, on a GPU: plain 1.17 s; `k` = 1, 2, 3, 4, 5, 8, 10 took 1.86, 1.21, 1.06, 1.05, 1.02, 1.19
# and 1.20 s with 60, 33, 24, 20, 17, 14 and 12 target passes: 1.15 times as fast at best. It used **no KV cache**: each
# pass computed the whole text again, the draft's passes too, so that drafting cost far more than it has to. And where
# all `k` drafts were right it kept `k` tokens and **threw the target's next token away**, which the same pass had
# computed: hence 60 passes at `k` = 1, no fewer than plain decoding, in half as much time again. Its idea is right, and
# so is its conclusion that a medium `k` is best; only the gain is larger than it could show.
