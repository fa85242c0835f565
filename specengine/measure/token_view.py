"""A generation token by token, as a part of a page: sources by underline and colour, everything else on demand."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

SCRIPT = "token_view.js"
_KINDS = {
    "draft": "accepted draft",
    "recovered": "the target’s, where a draft was rejected",
    "bonus": "the target’s, after all drafts were accepted",
    "target": "the target’s, without drafts",
}
_MARK = {"\n": "↵\n", "\t": "⇥\t"}


def token_view(name: str, tokens: Sequence[Mapping[str, Any]], prompt: str | None = None) -> str:
    """HTML of a section's body. It works with `assets/token_view.js` on the page; without a script the text is there,
    with its marks.

    name:   the beginning of its ids
    tokens: `TracedToken.to_dict()` of each
    """
    counts = Counter(token["source"] for token in tokens)
    legend = "".join(
        f'<li><span class="{kind}">abc</span> {words}: {counts[kind]}</li>'
        for kind, words in _KINDS.items()
        if counts[kind]
    )
    num_rejected = sum(len(token["rejected"]) for token in tokens)
    spans = "".join(_span(name, at, token) for at, token in enumerate(tokens))
    # "<" would end the script where a token is "</script>".
    data = json.dumps(list(tokens), ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    given = "" if prompt is None else f"<p>After the prompt <code>{html.escape(_short(prompt))}</code></p>"
    return f"""<div class="token-view">
{given}
<ul class="legend">{legend}</ul>
<label><input type="checkbox"> show the {num_rejected} rejected tokens in the text</label>
<div role="listbox" tabindex="0" aria-label="{len(tokens)} generated tokens; arrow keys choose one">{spans}</div>
<div class="detail" role="status"><p>Choose a token: click it, or go to the text and press arrow keys.</p></div>
<script type="application/json">{data}</script>
</div>"""


def _span(name: str, at: int, token: Mapping[str, Any]) -> str:
    fallen = "".join(each["text"] for each in token["rejected"])
    gone = f"<del>{_visible(fallen)}</del>" if token["rejected"] else ""
    text = _visible(token["text"]) or "·"
    return (
        f'{gone}<span class="t {token["source"]}" role="option" id="{name}-{at}" data-at="{at}">{text}</span>'
    )


def _visible(text: str) -> str:
    for character, shown in _MARK.items():
        text = text.replace(character, shown)
    return html.escape(text)


def _short(text: str) -> str:
    return text if len(text) <= 200 else "…" + text[-199:]
