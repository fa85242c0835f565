"""Without a second model: where a text repeats its prompt, the prompt drafts.

    python examples/lookup_for_edits.py

Editing given code, quoting, filling in forms: most of the output stands in the prompt already. `"suffix"` finds the
longest end of the text that occurred before, and drafts what followed it.
"""

import specengine

GIVEN = """class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __repr__(self):
        return "Point(%r, %r)" % (self.x, self.y)


"""
PROMPT = GIVEN + GIVEN + "class Point:\n"

plain = specengine.generate(PROMPT, max_new_tokens=80, num_speculative_tokens=0)
for drafter in ("ngram", "suffix"):
    result = specengine.generate(PROMPT, draft_model=drafter, max_new_tokens=80, num_speculative_tokens=16)
    assert result.token_ids == plain.token_ids
    drafts = result.metrics.speculative_decoding
    print(
        f"{drafter}: {result.metrics.num_target_forwards} forwards of the target instead of "
        f"{plain.metrics.num_target_forwards}, {drafts.draft_acceptance_rate:.0%} accepted"
    )
print(plain.text)
