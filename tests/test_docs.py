"""The site: it builds without a warning, says what the code says, and needs no network, not even for its search."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import typer
from browser import Opened, browser, needs_chromium, open_page

from specengine import config
from specengine.cli.entry import app

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Attributes by which a page asks for something, without anybody having clicked.
RESOURCES = {
    ("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("object", "data"),
    ("video", "src"), ("audio", "src"), ("embed", "src"), ("use", "href"), ("image", "href"), ("img", "srcset"),
}  # fmt: skip


class Page(HTMLParser):
    """What is in a page: where it can be linked to, where it links, what it loads, its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value or "")
            if tag == "a" and name == "href":
                self.links.append(value or "")
            if (tag, name) in RESOURCES:
                self.resources.append(value or "")
        if tag == "img":
            self.pictures.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def build(folder: Path, configuration: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    """The site as `make docs` makes it, elsewhere."""
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        str(configuration),
        "-d",
        str(folder),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {path.name: Page(path) for path in sorted(site.glob("*.html"))}


def load(name: str) -> ModuleType:
    """A script of tools/."""
    specification = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# What it is made of


def test_every_page_is_there_and_in_the_menu(pages: dict[str, Page]) -> None:
    written = {f"{path.stem}.html" for path in DOCS.glob("*.md")}
    assert written == set(pages) - {"404.html"}
    menu = {urlsplit(link).path for link in pages["index.html"].links}
    assert written <= menu | {"index.html"}


def test_every_link_leads_somewhere(pages: dict[str, Page], site: Path) -> None:
    """To a page, and where it says so to a place in it."""
    broken = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = unquote(parts.path).lstrip("/") or name  # 404.html links from the root
            target = {".": "index.html"}.get(target, target)
            anchors = pages[target].anchors if target in pages else None
            is_there = (site / target).is_file() if anchors is None else True
            if not is_there or (parts.fragment and unquote(parts.fragment) not in (anchors or ())):
                broken.append((name, link))
    assert broken == []


def test_no_page_loads_anything_from_elsewhere(pages: dict[str, Page], site: Path) -> None:
    for name, page in pages.items():
        for resource in page.resources:
            parts = urlsplit(resource)
            assert not parts.scheme, f"{name}: {resource}"
            assert not parts.netloc, f"{name}: {resource}"
            assert (site / parts.path.lstrip("/")).is_file(), f"{name}: {resource}"
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", path.read_text(encoding="utf-8")), path


def test_the_search_knows_every_page(site: Path) -> None:
    text = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("var __index = "))
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert found == {f"{path.stem}.html" for path in DOCS.glob("*.md")}


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    """The build itself is strict: also about places in pages."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(
        "# A page\n\n[somewhere](index.md#nowhere)\n", encoding="utf-8"
    )
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    start = "\n".join(re.findall(r"^(?:site_name: .*|strict: .*|validation:(?:\n .*)*)$", text, re.MULTILINE))
    (tmp_path / "mkdocs.yml").write_text(start, encoding="utf-8")
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode != 0
    assert "#nowhere" in done.stdout + done.stderr


# What it says


def commands(command: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, each in getattr(command, "commands", {}).items():
        yield from (
            commands(each, f"{before}{name} ") if hasattr(each, "commands") else [(f"{before}{name}", each)]
        )


def test_every_command_and_option_is_on_the_page(site: Path) -> None:
    """Each option in the part of its command."""
    html = (site / "command-line.html").read_text(encoding="utf-8")
    found = list(commands(typer.main.get_command(app)))
    assert len(found) >= 5
    for name, command in found:
        part = re.search(rf'<h3 id="{name.replace(" ", "-")}">.*?(?=<h3 |</article>)', html, re.DOTALL)
        assert part is not None, name
        listed = set(
            re.findall(r"-{1,2}[a-z][\w-]*", " ".join(re.findall(r"<dt>.*?</dt>", part[0], re.DOTALL)))
        )
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert {*parameter.opts, *parameter.secondary_opts} <= listed, (name, parameter.name)


@pytest.mark.parametrize("name", ["ModelOptions", "SamplingParams", "ChatOptions", "EngineConfig"])
def test_every_option_of_the_library_is_in_the_reference(name: str, site: Path) -> None:
    html = (site / "reference.html").read_text(encoding="utf-8")
    part = re.search(rf'<h3 id="{name.lower()}">.*?(?=<h[23] )', html, re.DOTALL)
    assert part is not None
    listed = re.findall(r"<dt><code>(\w+)=", part[0])
    assert listed == [item.name for item in fields(getattr(config, name))]


def test_the_reference_has_what_the_package_gives(pages: dict[str, Page]) -> None:
    import specengine
    from specengine.measure import figures, statistics, theory

    anchors = {anchor.rpartition(".")[2] for anchor in pages["reference.html"].anchors}
    options = {"SamplingParams", "ChatOptions", "EngineConfig"}
    assert set(specengine.__all__) - options - {"__version__"} <= anchors
    for module in (theory, figures, statistics):
        own = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
        assert own
        assert set(own) <= anchors


def test_docstrings_become_lists(site: Path) -> None:
    """Lists of names in this project's docstrings are lists on the page, not run together."""
    html = (site / "reference.html").read_text(encoding="utf-8")
    for name in ("streamer", "finish_reason", "num_trimmed_tokens", "draft_model", "alternative_text"):
        assert f"<dt><code>{name}</code></dt>" in html
    docstrings = load("docs_docstrings")
    text = (
        "Says *so*.\n\na, b: one [k]\n      and more\nreturns  all\n\n    code[0]  # stays\n\n"
        "Note: a sentence\nof two lines"
    )
    assert docstrings.as_markdown(text) == (
        "Says \\*so\\*.\n\n`a, b`\n:   one \\[k\\] and more\n\n`returns`\n:   all\n\n    code[0]  # stays\n\n"
        "Note: a sentence\nof two lines"
    )


# Its pictures


def is_screenshot(picture: dict[str, str | None]) -> bool:
    return (picture["src"] or "").startswith("screenshots/")


def test_screenshots_are_small_and_say_what_they_show(pages: dict[str, Page]) -> None:
    shown = [picture for page in pages.values() for picture in page.pictures if is_screenshot(picture)]
    assert {picture["src"] for picture in shown} == {
        f"screenshots/{path.name}" for path in (DOCS / "screenshots").iterdir()
    }
    for picture in shown:
        assert len(picture["alt"] or "") > 40
        assert (DOCS / (picture["src"] or "")).stat().st_size < 200_000


def test_every_figure_is_there_in_light_and_dark_and_says_what_it_holds(pages: dict[str, Page]) -> None:
    drawn = load("docs_figures")
    texts = drawn.alternative_texts(json.loads(drawn.DATA.read_text(encoding="ascii")))
    shown: set[str] = set()
    for page in pages.values():
        for picture in itertools.filterfalse(is_screenshot, page.pictures):
            found = re.fullmatch(r"figures/([\w-]+?)(-dark)?\.svg#only-(light|dark)", picture["src"] or "")
            assert found is not None, picture
            assert (found[2] is not None) == (found[3] == "dark")
            said, holds = (" ".join(text.split()) for text in (picture["alt"] or "", texts[found[1]]))
            assert said == holds, "after a change of the figures: python tools/docs_figures.py"
            shown.add(picture["src"] or "")
    assert len(shown) == 2 * len(texts)
    files = {path.name for path in (DOCS / "figures").glob("*.svg")}
    assert files == {f"{name}{ending}.svg" for name in texts for ending in ("", "-dark")}


# In a browser

PHONE = 390


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as launched:
        yield launched


def assert_quiet(opened: Opened) -> None:
    assert opened.complaints == []
    assert [asked for asked in opened.requests if not asked.startswith(("file:", "data:"))] == []


@needs_chromium
def test_search_works_from_a_file(site: Path, chromium: Any) -> None:
    opened = open_page(chromium, site / "index.html")
    page = opened.page
    page.click("input[name=query]")
    page.keyboard.type("row invariance", delay=10)
    hit = page.locator(".md-search-result__link[href*='design.html']").first
    hit.wait_for()
    hit.click()
    page.wait_for_url(re.compile(r"design\.html"))
    assert "Row invariance" in page.inner_text("article")
    assert_quiet(opened)


@needs_chromium
def test_every_page_opens_on_a_phone(site: Path, chromium: Any) -> None:
    """Without a sideways scroll of the page itself; in the dark, with the pictures that are made for it."""
    opened = open_page(chromium, site / "index.html", width=PHONE, scheme="dark")
    page = opened.page
    for path in sorted(DOCS.glob("*.md")):
        page.goto((site / f"{path.stem}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE, path.stem
        for picture in page.locator('article img[src*="#only-"]').all():
            is_dark = "#only-dark" in (picture.get_attribute("src") or "")
            assert picture.is_visible() == is_dark, path.stem
            assert picture.evaluate("each => each.naturalWidth") > 0 or not is_dark
    assert_quiet(opened)


@needs_chromium
def test_light_and_dark_can_be_chosen(site: Path, chromium: Any) -> None:
    opened = open_page(chromium, site / "how-it-works.html", scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = opened.page.evaluate(colour)
    opened.page.locator("form[data-md-component=palette] label:visible").click()
    opened.page.wait_for_function(f"{colour} != {json.dumps(dark)}")
    assert opened.page.locator("article img[src*='#only-light']").first.is_visible()
    assert_quiet(opened)
