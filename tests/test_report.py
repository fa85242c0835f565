"""A page of figures holds everything that it shows, in both styles, and reaches for nothing."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

from specengine.measure.figures import Explained, Style, k_over_time, rejection_positions
from specengine.measure.report import Chapter, Draw, Section, page, table, write_page


def rejections(style: Style) -> Explained:
    return rejection_positions([4, 2], 5, style=style)


def choices(style: Style) -> Explained:
    return k_over_time({'<b>"copy"</b>': [4, 8]}, style=style)


def one(draws: Sequence[Draw], facts: Sequence[tuple[str, str]] = ()) -> list[Chapter]:
    return [Chapter("", facts, draws=draws)]


class Elements(HTMLParser):
    """Tags with attributes, in order; and that what opens is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "link", "img", "source", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def svg(data: str) -> str:
    head, _, body = data.partition(",")
    assert head == "data:image/svg+xml;base64"
    text = base64.b64decode(body).decode()
    ElementTree.fromstring(text)
    return text


def test_a_page_holds_every_figure_light_and_dark() -> None:
    elements = Elements(page("A & B", one([rejections, choices], [("target", "<gpt2>")]))).found
    images = [attributes for tag, attributes in elements if tag == "img"]
    sources = [attributes for tag, attributes in elements if tag == "source"]
    assert [image["alt"] for image in images] == [
        draw("light").alternative_text for draw in (rejections, choices)
    ]
    for image, source in zip(images, sources, strict=True):
        assert "#ffffff" in svg(image["src"])
        assert "#16181d" in svg(source["srcset"])
        assert source["media"] == "screen and (prefers-color-scheme: dark)", "paper is white"
    links = {attributes["href"] for tag, attributes in elements if tag == "a"}
    assert links == {"#" + attributes["id"] for tag, attributes in elements if tag == "section"}


def test_a_page_reaches_for_nothing() -> None:
    """No script, and no address in it but the names of XML's vocabularies."""
    text = page("Report", one([rejections]))
    elements = Elements(text).found
    assert "script" not in {tag for tag, _ in elements}
    for _, attributes in elements:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
        pictures = [svg(attributes[name]) for name in ("src", "srcset") if name in attributes]
        assert all(
            reference.startswith(("#", "data:"))
            for picture in pictures
            for reference in re.findall(r'href="([^"]*)"|url\(([^)]*)\)', picture)
            for reference in reference
            if reference
        )
    assert not re.search(r"https?://", text)


def test_what_is_written_stays_written(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_page(path, "one")
    with pytest.raises(FileExistsError):
        write_page(path, "another")
    assert path.read_text(encoding="utf-8") == "one"


def test_a_figure_comes_once() -> None:
    with pytest.raises(ValueError, match="'rejection-positions' came 2 times"):
        page("Report", one([rejections, partial(rejections)]))


def test_what_is_written_into_a_page_is_text() -> None:
    """Names, cells and prompts that look like markup."""
    cell = "<script>alert(1)</script>"
    chapter = Chapter(
        cell, [(cell, cell)], [Section("a", cell, table([cell], [[cell]], cell))], missing=[cell]
    )
    elements = Elements(page(cell, [chapter])).found
    assert "script" not in {tag for tag, _ in elements}
