"""A result in a notebook: every character of its text once, under the source of its token, and its metrics."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

import specengine
from specengine import CompletionOutput, GenerationResult
from specengine.outputs import GenerationMetrics
from specengine.runtime.text import TextStream
from specengine.tokenizer import IncrementalDetokenizer, Tokenizer

PROMPT = "def <b>&amp;(x):\n"


class Page(HTMLParser):
    """Texts by the class of the element they are in, and what the table says; that what opens is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.pre: list[tuple[str, str]] = []
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, kind = self.open[-1] if self.open else ("", "")
        self.texts.append((kind, data))
        if any(name == "pre" for name, _ in self.open):
            self.pre.append((kind, data))
        if tag in ("th", "td"):
            self.cells.append(data)


def by_token(output: CompletionOutput) -> list[tuple[str, str]]:
    """(source, text) of each token."""
    ends = [*output.text_offsets[1:], len(output.text)]
    places = zip(output.token_source, output.text_offsets, ends, strict=True)
    return [(source, output.text[start:end]) for source, start, end in places]


def generate(prompt: str = PROMPT, **options: Any) -> GenerationResult:
    return specengine.generate(prompt, **{"max_new_tokens": 24, "num_speculative_tokens": 3, **options})


def bundled_tokenizer() -> Tokenizer:
    with specengine.Engine(specengine.bundled.target_path()) as engine:
        assert engine.tokenizer is not None
        return engine.tokenizer


def test_every_character_is_shown_under_its_source() -> None:
    result = generate()
    page = Page(result._repr_html_())
    assert page.tags <= {"div", "style", "pre", "span", "p", "table", "tr", "th", "td"}, "not escaped"
    assert page.pre[0] == ("", PROMPT)
    assert "".join(text for _, text in page.pre[1:]) == result.text
    shown = [kind for kind, text in page.pre[1:] for _ in text]
    assert shown == [source for source, text in by_token(result.outputs[0]) for _ in text]
    assert {"draft", "target"} == set(shown)
    assert "drafted, and accepted by the target" in [text for kind, text in page.texts if kind == "draft"]


def test_metrics_are_the_results() -> None:
    result = generate()
    cells = Page(result._repr_html_()).cells
    table = dict(zip(cells[::2], cells[1::2], strict=True))
    speculation = result.metrics.speculative_decoding
    assert table["forwards of the target"] == str(result.metrics.num_target_forwards)
    assert table["to the first token"] == f"{result.metrics.time_to_first_token:.3f} s"
    assert table["speed"] == f"{result.metrics.tokens_per_second:.1f} tokens/s"
    assert table["drafts accepted"].startswith(
        f"{speculation.num_accepted_draft_tokens} of {speculation.num_draft_tokens}, "
    )
    assert "drafts accepted" not in Page(generate(num_speculative_tokens=0)._repr_html_()).cells


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stop": ["return"]},
        {"stop": ["n<|endoftext|>", "elf"]},
        {"include_stop_str_in_output": True, "stop": [":"]},
    ],
)
def test_offsets_cut_a_text_into_its_tokens(options: dict[str, Any]) -> None:
    result = generate("class Stack:\n    def push(self, x):\n", **options)
    output = result.outputs[0]
    assert "".join(text for _, text in by_token(output)) == output.text
    assert output.text_offsets == sorted(output.text_offsets)
    assert len(output.text_offsets) == len(output.token_ids) == 24 or output.finish_reason == "stop"
    plain = generate("class Stack:\n    def push(self, x):\n", num_speculative_tokens=0, **options)
    assert plain.outputs[0].text_offsets == output.text_offsets


def test_offsets_are_where_the_tokens_texts_begin() -> None:
    output = generate().outputs[0]
    detokenizer = IncrementalDetokenizer(bundled_tokenizer(), generate().prompt_token_ids)
    lengths = [len(detokenizer.push(token)) for token in output.token_ids]
    assert output.text_offsets == [sum(lengths[:index]) for index in range(len(lengths))]


def test_a_token_inside_a_character_is_empty() -> None:
    """Byte by byte: the last of a character's tokens shows it."""
    tokenizer = bundled_tokenizer()
    tokens = tokenizer.encode("é€ab")
    stream = TextStream(tokenizer, [], stop=(), include_stop=False)
    for token in tokens:
        stream.push(token, may_stop=False)
    stream.close(may_stop=False)
    offsets = stream.offsets(len(tokens) + 2)
    ends = [*offsets[1:], len(stream.text)]
    texts = [stream.text[start:end] for start, end in zip(offsets, ends, strict=True)]
    assert "".join(texts) == "é€ab"
    assert texts[-2:] == ["", ""], "tokens that are not shown are at the end"
    assert "" in texts[: len(tokens)], "no token was inside a character"


def test_samples_endings_and_losses_are_told() -> None:
    result = generate(n=2, temperature=1.0, seed=3)
    text = result._repr_html_()
    assert re.findall(r"Sample (\d), seed (\d+)", text) == [
        (str(output.index), str(output.seed)) for output in result.outputs
    ]
    assert "Lossy" not in text
    assert "Lossy" in replace(result, lossless=False)._repr_html_()
    by_hand = CompletionOutput(0, [], "a <i>", "error", None, None, None, [], 0, error="<nan>")
    failed = GenerationResult([5, 6], [by_hand], GenerationMetrics())._repr_html_()
    assert "an error: &lt;nan&gt;" in failed
    assert "[2 tokens]" in failed
    assert "a &lt;i&gt;" in failed
    assert "stop &#x27;&lt;&#x27;" in replace(by_hand, finish_reason="stop", stop_reason="<")._repr_html_()


def test_a_sample_shows_itself() -> None:
    output = generate().outputs[0]
    page = Page(output._repr_html_())
    assert "".join(text for _, text in page.pre) == output.text
    assert page.cells == []


def test_nothing_heavy_is_loaded_for_it() -> None:
    code = (
        "import sys, specengine.html_view; print(sorted({'torch', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout == "[]\n"
