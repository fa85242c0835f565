"""A drafter of your own: an object with a name and three methods.

    python examples/custom_drafter.py

This one has learnt by heart which token followed which in a text, and drafts a chain of them. It need not be clever,
nor right: whatever it proposes, the output is the target's.
"""

import itertools
from collections import Counter, defaultdict

from specengine import DraftProposal, Engine, SamplingParams, bundled

TEXT = "import os\nimport sys\n\n\ndef main():\n    return 0\n\n\nif __name__ == '__main__':\n    sys.exit(main())\n"


class ByHeart:
    """Drafts, after each token, what followed it most often."""

    name = "by-heart"

    def __init__(self, tokens):
        following = defaultdict(Counter)
        for token, after in itertools.pairwise(tokens):
            following[token][after] += 1
        self.after = {token: counts.most_common(1)[0][0] for token, counts in following.items()}
        self.num_accepted = 0

    def propose(self, batch):
        drafts = []
        for index, limit in enumerate(batch.draft_limits):
            token, chain = batch.committed(index)[-1], []
            while len(chain) < limit and token in self.after:
                token = self.after[token]
                chain.append(token)
            drafts.append(chain)
        return DraftProposal.from_lists(drafts, device=batch.seq_len.device)

    def observe(self, batch, num_accepted):
        """After each round: how many of its tokens were accepted, a number for each sequence."""
        self.num_accepted += int(num_accepted.sum())

    def release(self, sequence_id):
        """A sequence is over; there is nothing to forget."""


with Engine(bundled.target_path()) as engine:
    tokens = engine.tokenizer.encode(TEXT)
    plain = engine.generate("import os\n", SamplingParams(max_new_tokens=40))

drafter = ByHeart(tokens)
with Engine(bundled.target_path(), drafter) as engine:
    result = engine.generate("import os\n", SamplingParams(max_new_tokens=40, num_speculative_tokens=3))

assert result.token_ids == plain.token_ids
print(result.text)
print("---")
print(f"{drafter.num_accepted} drafted tokens were accepted, and the text is the same")
