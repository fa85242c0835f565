"""How a result shows itself in a notebook: its text, marked by who wrote each token, and a small table of what it took.

Colours are tints behind the page's own ink, so that the text keeps its contrast on light and dark pages, whichever
decides between them; who wrote a token is also told by the kind of underline. No script, nothing from a network.
"""

from __future__ import annotations

import html
from itertools import groupby

from specengine.outputs import CompletionOutput, GenerationResult, TokenSource

_CSS = """\
.specengine-result { max-width: 60rem; line-height: 1.6 }
.specengine-result pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 0.95em/1.7 monospace; color: inherit;
  background: none; border: 0; margin: 0.3em 0; padding: 0 }
.specengine-result .draft { background: rgba(0, 150, 110, 0.17); border-bottom: 2px solid rgb(0, 140, 105) }
.specengine-result .target { background: rgba(225, 120, 0, 0.17); border-bottom: 2px dotted rgb(205, 105, 0) }
.specengine-result table { border-collapse: collapse; margin: 0.3em 0; color: inherit; font-size: 0.95em }
.specengine-result tr { background: none }
.specengine-result th { text-align: left; font-weight: normal; padding: 0.1em 1.5em 0.1em 0 }
.specengine-result td { text-align: right; padding: 0.1em 0; font-variant-numeric: tabular-nums }
.specengine-result p { margin: 0.3em 0 }
"""
_LEGEND: dict[TokenSource, str] = {
    "draft": "drafted, and accepted by the target",
    "target": "the target's own",
}


def completion_html(output: CompletionOutput) -> str:
    """One sample: its text, and why it ended."""
    return _framed(_text("", output) + _ending(output) + _legend([output]))


def result_html(result: GenerationResult) -> str:
    """The prompt with each of its samples, and the metrics of all."""
    prompt = result.prompt
    shown = f"[{len(result.prompt_token_ids)} tokens] " if prompt is None else prompt
    several = len(result.outputs) > 1
    parts = []
    for output in result.outputs:
        heading = f"<p>Sample {output.index}, seed {output.seed}</p>\n" if several else ""
        parts.append(heading + _text(shown, output) + _ending(output))
    lossy = "" if result.lossless else "<p><strong>Lossy:</strong> not what the target alone would say.</p>\n"
    return _framed("".join(parts) + _legend(result.outputs) + lossy + _table(result))


def _framed(content: str) -> str:
    return f'<div class="specengine-result">\n<style>\n{_CSS}</style>\n{content}</div>'


def _text(prompt: str, output: CompletionOutput) -> str:
    """The prompt and then the sample's text, neighbours of one source in one span."""
    ends = [*output.text_offsets[1:], len(output.text)]
    pieces = [
        (source, output.text[start:end])
        for source, start, end in zip(output.token_source, output.text_offsets, ends, strict=False)
    ]
    spans = []
    for source, group in groupby(pieces, key=lambda piece: piece[0]):
        if text := "".join(piece for _, piece in group):
            spans.append(f'<span class="{source}">{html.escape(text)}</span>')
    # What belongs to no token, as in a result that was put together by hand, is shown as it is.
    unmarked = output.text if not pieces else ""
    return f"<pre><span>{html.escape(prompt)}</span>{''.join(spans)}{html.escape(unmarked)}</pre>\n"


def _ending(output: CompletionOutput) -> str:
    reasons = {
        "length": "as many tokens as were allowed",
        "abort": "it was given up",
        "stop": "the model's end",
    }
    if output.finish_reason == "error":
        reason = f"an error: {output.error}"
    elif output.stop_reason is not None:
        reason = f"stop {output.stop_reason!r}"
    else:
        reason = reasons[output.finish_reason]
    return f"<p>{len(output.token_ids)} tokens, ended by {html.escape(reason)}</p>\n"


def _legend(outputs: list[CompletionOutput]) -> str:
    found = {source for output in outputs for source in output.token_source}
    marks = [
        f'<span class="{source}">{meaning}</span>' for source, meaning in _LEGEND.items() if source in found
    ]
    return f"<p>{', '.join(marks)}</p>\n" if marks else ""


def _table(result: GenerationResult) -> str:
    metrics, speculation = result.metrics, result.metrics.speculative_decoding
    rows = [
        ("prompt", f"{metrics.num_prompt_tokens} tokens, {metrics.num_cached_tokens} cached"),
        ("time", f"{metrics.total_time:.3f} s"),
        ("to the first token", f"{metrics.time_to_first_token:.3f} s"),
        ("speed", f"{metrics.tokens_per_second:.1f} tokens/s"),
        ("forwards of the target", f"{metrics.num_target_forwards}"),
    ]
    if speculation.num_draft_tokens:
        share = f"{speculation.draft_acceptance_rate:.1%}"
        counts = f"{speculation.num_accepted_draft_tokens} of {speculation.num_draft_tokens}"
        rows += [
            ("drafts accepted", f"{counts}, {share}"),
            ("tokens a round", f"{speculation.mean_acceptance_length:.2f}"),
        ]
    body = "".join(
        f'<tr><th scope="row">{name}</th><td>{html.escape(value)}</td></tr>\n' for name, value in rows
    )
    return f"<table>\n{body}</table>\n"
