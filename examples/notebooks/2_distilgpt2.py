# %% [markdown]
# # 2. A cache that is not rolled back: distilgpt2 → gpt2
#
# A lab notebook kept the target's KV cache between rounds, 5 drafts a round, 20 tokens, and reported: plain 1.23 s,
# speculative 8.89 s, **and a different text**. Here is its loop, what happens in it round by round, the one line
# that it lacks, and the same with this engine.

# %%
import time

import common
import torch
from common import Table, show, size
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache
from transformers.utils.logging import disable_progress_bar

from specengine import Engine
from specengine.measure import figures

disable_progress_bar()
pair = common.find_pair("gpt2", "distilgpt2")
pair

# %%
K = 5
NUM_TOKENS = size(20, 8)
REPEATS = size(2, 1)
PROMPT = pair.prompts[1]

tokenizer = AutoTokenizer.from_pretrained(pair.target)
target, draft = (
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for path in (pair.target, pair.draft)
)
prompt_ids = tokenizer(PROMPT).input_ids


def likeliest(logits):
    """The greedy choice after each of the rows."""
    return logits[0].argmax(dim=-1).tolist()


# %% [markdown]
# ## Plain decoding, in `transformers`
#
# The cache holds keys and values of every token that the target has read, one entry a token: what is fed next comes at
# the position after the last entry.


# %%
@torch.no_grad()
def plain_loop():
    cache, ids, feed = DynamicCache(config=target.config), list(prompt_ids), list(prompt_ids)
    while len(ids) < len(prompt_ids) + NUM_TOKENS:
        logits = target(torch.tensor([feed]), past_key_values=cache).logits
        feed = likeliest(logits)[-1:]
        ids += feed
    return ids[len(prompt_ids) :]


plain_ids = plain_loop()
print(tokenizer.decode(plain_ids))

# %% [markdown]
# ## The original's loop
#
# The draft guesses 5 tokens. The target reads them, on top of its cache, and so says what it would have written at each
# place. The guesses are kept up to the first wrong one, and there the target's own token comes instead. With
# `roll_back=False` this is the original: **the cache keeps the entries of the rejected guesses**.


# %%
@torch.no_grad()
def speculative_loop(*, roll_back):
    cache, ids, rounds = DynamicCache(config=target.config), list(prompt_ids), []
    target(
        torch.tensor([ids[:-1]]), past_key_values=cache
    )  # all but the last: it is fed with the first guesses
    while len(ids) < len(prompt_ids) + NUM_TOKENS:
        # The draft has no cache here: it would have to be rolled back just the same.
        guesses = []
        for _ in range(K):
            guesses += likeliest(draft(torch.tensor([ids + guesses])).logits)[-1:]
        said = likeliest(target(torch.tensor([ids[-1:] + guesses]), past_key_values=cache).logits)
        num_accepted = next((i for i, guess in enumerate(guesses) if guess != said[i]), K)
        ids += guesses[:num_accepted] + said[num_accepted : num_accepted + 1]
        if roll_back:
            cache.crop(len(ids) - 1 - cache.get_seq_length())  # a negative number: so many entries go
        rounds.append((num_accepted, len(ids) - 1, cache.get_seq_length()))
    return ids[len(prompt_ids) :][:NUM_TOKENS], rounds


original_ids, original_rounds = speculative_loop(roll_back=False)
print(tokenizer.decode(original_ids))

# %%
same = next((i for i in range(NUM_TOKENS) if original_ids[i] != plain_ids[i]), NUM_TOKENS)
print(f"the first {same} of {NUM_TOKENS} tokens are those of plain decoding")

# %% [markdown]
# ## Why
#
# After each round the cache should have as many entries as there are tokens before the one that is fed next. Every
# rejected guess leaves one too many. From the first rejection on the target reads guesses that nobody wrote as if they
# were part of the text, and believes that it is further along than it is: it answers another question than it was
# asked. Its own text then looks less and less like what it would say, so that the draft is right less often, and rounds
# get longer besides, since they read the whole heap.

# %%
Table(
    ["round", "accepted of 5", "entries there should be", "entries there are", "entries of nothing"],
    [
        (i + 1, accepted, expected, found, found - expected)
        for i, (accepted, expected, found) in enumerate(original_rounds)
    ],
)

# %% [markdown]
# ## The line that was missing
#
# Throwing the entries of rejected guesses away after each round gives plain decoding's text.

# %%
mended_ids, mended_rounds = speculative_loop(roll_back=True)
assert mended_ids == plain_ids
assert all(expected == found for _, expected, found in mended_rounds)
print(tokenizer.decode(mended_ids))


# %%
def timed(loops):
    """Seconds of each, in turn. Whoever comes first has run before: nothing is warmed up here."""
    found = {name: [] for name in loops}
    for _ in range(REPEATS):
        for name, loop in loops.items():
            begin = time.perf_counter()
            loop()
            found[name].append(time.perf_counter() - begin)
    return found


times = timed(
    {
        "plain loop": plain_loop,
        "original loop": lambda: speculative_loop(roll_back=False),
        "rolled-back loop": lambda: speculative_loop(roll_back=True),
    }
)

# %% [markdown]
# ## This engine
#
# It rolls back by lowering one number a sequence; nothing is copied. Plain decoding and speculation give the same
# tokens, and the same bits of their log-probabilities. On a CPU the draft's weights are kept in int8: distilgpt2 is
# half as large as gpt2, so that in the target's own precision five of its steps cost more than they save.

# %%
engine = Engine(
    pair.target,
    pair.draft,
    dtype="float32",
    draft_weight_dtype=common.int8_on_cpu(),
    enable_prefix_cache=False,
)


def generate(k, **more):
    return engine.generate(
        PROMPT, num_speculative_tokens=k, max_new_tokens=NUM_TOKENS, ignore_eos=True, **more
    )


ours_plain, ours = generate(0, logprobs=0), generate(K, logprobs=0)
assert ours.token_ids == ours_plain.token_ids
assert ours.outputs[0].logprobs == ours_plain.outputs[0].logprobs
print("as transformers' plain text:", ours.token_ids == plain_ids)
ours

# %% [markdown]
# ## Time and text, side by side

# %%
times |= timed({"engine, plain": lambda: generate(0), "engine, 5 drafts": lambda: generate(K)})
texts = {
    "plain loop": plain_ids,
    "original loop": original_ids,
    "rolled-back loop": mended_ids,
    "engine, plain": ours_plain.token_ids,
    "engine, 5 drafts": ours.token_ids,
}
rounds = {"original loop": original_rounds, "rolled-back loop": mended_rounds}
accepted = {name: sum(each[0] for each in found) / (K * len(found)) for name, found in rounds.items()}
accepted["engine, 5 drafts"] = ours.metrics.speculative_decoding.draft_acceptance_rate
Table(
    ["", "time, s", "acceptance", "the text of plain decoding"],
    [
        (
            name,
            common.with_interval(times[name], 3),
            f"{accepted[name]:.0%}" if name in accepted else "–",
            "yes" if texts[name] == plain_ids else "NO",
        )
        for name in texts
    ],
)

# %%
show(
    figures.bars_by_prompt({name: {f"{NUM_TOKENS} tokens": times[name]} for name in texts}, "time", by="loop")
)

# %%
engine.close()

# %% [markdown]
# ## What the original got wrong
#
# **The cache is never rolled back**, so the target judges each guess after a text that is not there. The result is not
# "the same text, faster" but another text, more slowly: 8.89 s beside 1.23 s. Nothing in its output shows the fault
# unless the two texts are compared: whoever writes such a loop should begin with `assert speculative == plain`. It is
# an easy fault to make, since keeping a cache is what one is told to do, and the loop without any cache is right.
