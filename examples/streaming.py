"""Text as it comes, with what was drafted in brackets.

    python examples/streaming.py

An event holds what became final in one round: several tokens, the last of them the target's own. Its text never ends
in the middle of a character, so it may lag behind its tokens.
"""

import specengine

num_events = num_tokens = num_drafted = 0
for event in specengine.stream("import json\nimport os\n", max_new_tokens=40, num_speculative_tokens=4):
    print(f"[{event.text_delta}]", end="", flush=True)
    num_events += 1
    num_tokens += len(event.token_ids)
    num_drafted += event.token_source.count("draft")
    if event.result is not None:  # the last event of a prompt carries everything
        result = event.result

print("\n---")
print(f"{num_tokens} tokens in {num_events} events, {num_drafted} of them drafted")
assert result.token_ids == specengine.generate("import json\nimport os\n", max_new_tokens=40).token_ids
