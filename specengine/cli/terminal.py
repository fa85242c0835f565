"""What a person looks at: text coloured by who wrote each token, and a table of what speculation did."""

from __future__ import annotations

import os
from typing import TextIO

from rich.console import Console
from rich.style import Style
from rich.table import Table

from specengine.outputs import GenerationMetrics, SpeculativeDecodingMetrics, TokenSource

RESET = "\x1b[0m"
STYLES: dict[TokenSource, Style] = {
    "draft": Style(color="green", bold=True),
    "target": Style(color="yellow", bold=True),
}
LEGEND: dict[TokenSource, str] = {
    "draft": "drafted, and accepted by the target",
    "target": "the target's own",
}


def wants_color(choice: str, stream: TextIO) -> bool:
    """Whether to colour `stream`, for `choice` "auto", "always" or "never"; see https://no-color.org."""
    if choice != "auto":
        return choice == "always"
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, source: TokenSource) -> str:
    """`text` with the terminal codes of its source around it."""
    return f"{STYLES[source].render(text)}"


def legend() -> str:
    """One line that says which colour is whose."""
    return "  ".join(f"{paint('■', source)} {words}" for source, words in LEGEND.items())


def metrics_table(metrics: GenerationMetrics) -> Table:
    """The figures of one result."""
    speculation = metrics.speculative_decoding
    rows = [
        ("prompt tokens", f"{metrics.num_prompt_tokens} ({metrics.num_cached_tokens} from the prefix cache)"),
        ("new tokens", f"{metrics.num_generated_tokens}"),
        ("first token", f"after {metrics.time_to_first_token * 1e3:.1f} ms"),
        ("prompt", f"{metrics.prompt_time * 1e3:.1f} ms, {metrics.prompt_tokens_per_second:.1f} tokens/s"),
        ("decode", f"{metrics.decode_time * 1e3:.1f} ms"),
        ("speed", f"{metrics.tokens_per_second:.1f} tokens/s"),
        ("target forwards", f"{metrics.num_target_forwards}"),
        (
            "draft tokens",
            f"{speculation.num_draft_tokens} ({speculation.num_accepted_draft_tokens} accepted)",
        ),
        ("drafts a round", _drafts_a_round(speculation)),
        ("acceptance rate", f"{speculation.draft_acceptance_rate:.1%}"),
        ("by position", " ".join(f"{share:.0%}" for share in speculation.acceptance_by_position) or "-"),
        ("mean acceptance length", f"{speculation.mean_acceptance_length:.2f} tokens a round"),
        ("lossless", "yes" if speculation.lossless else "NO: not distributed as the target says"),
    ]
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def _drafts_a_round(speculation: SpeculativeDecodingMetrics) -> str:
    """On average, and how often which number."""
    counts = enumerate(speculation.num_rounds_by_num_draft)
    each = " ".join(f"{k}:{count}" for k, count in counts if count)
    text = f"{speculation.mean_num_draft_tokens:.2f} ({each})" if each else "-"
    speedup = speculation.estimated_speedup
    return text if speedup is None else f"{text}; {speedup:.2f} times plain decoding, as estimated"


def stderr_console() -> Console:
    """Diagnostics go here; built per call because tests and shells replace the stream."""
    return Console(stderr=True, highlight=False)
