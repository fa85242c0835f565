"""From a run's metrics to what it should have gained, and to pictures.

    python examples/metrics_and_figures.py [FOLDER]

Pictures need matplotlib (`pip install "specengine[report]"`) and are ordinary matplotlib figures. Without a folder
nothing is written.
"""

import sys
from pathlib import Path

import specengine
from specengine.measure import figures
from specengine.measure.theory import Costs, best_num_drafts, conditional_acceptances, expected_tokens

PROMPTS = ["import json\nimport os\n", "class Stack:\n", "def binary_search(items, x):\n"]

results = specengine.generate(PROMPTS, max_new_tokens=60, num_speculative_tokens=6, ignore_eos=True)
drafted, accepted, rejected = [0] * 6, [0] * 6, [0] * 6
for result in results:
    counts = result.metrics.speculative_decoding
    for at in range(len(counts.num_drafted_by_position)):
        drafted[at] += counts.num_drafted_by_position[at]
        accepted[at] += counts.num_accepted_by_position[at]
        rejected[at] += counts.rejection_positions[at]

# How often a draft is accepted if all before it were, position by position.
acceptances = conditional_acceptances(accepted, rejected)
print("accepted, if all before were:", " ".join(f"{share:.0%}" for share in acceptances))
print(f"tokens a round, by formula: {expected_tokens(acceptances):.2f}")

costs = Costs(draft=0.2, verify=1.1)  # `specengine profile` and `specengine bench latency` measure yours
best, gain = best_num_drafts(acceptances, costs)
print(f"best for a draft step of {costs.draft} plain steps: k = {best}, {gain:.2f} times as fast")

drawn = [
    figures.acceptance_by_position(drafted, accepted, rejected),
    figures.rejection_positions(rejected),
    figures.speed_up_by_k([0.5, 0.7, 0.9], costs),
]
for each in drawn:
    print(f"{each.title}: {each.alternative_text[:70]}...")
    if len(sys.argv) > 1:
        each.save(Path(sys.argv[1]) / f"{each.name}.png")
