"""One page that holds all it shows: no network, light or dark as the reader prefers, fit for a phone and for paper."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from specengine.measure.figures import Explained, Style

# Draws a figure in a style; the functions of `figures` with their data: `partial(acceptance_by_k, rates)`.
Draw = Callable[[Style], Explained]


class Section(NamedTuple):
    """A part of a page that is no figure.

    name:    of the link's target
    html:    the body
    is_long: whether it may go on over the end of a printed page
    """

    name: str
    title: str
    html: str
    is_long: bool = False


class Chapter(NamedTuple):
    """Sections, then figures, each to be drawn twice, light and dark; then an appendix, and what could not be shown."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = ()
    draws: Sequence[Draw] = ()
    appendix: Sequence[Section] = ()
    missing: Sequence[str] = ()


def page(title: str, chapters: Sequence[Chapter], *, scripts: Sequence[str] = ()) -> str:
    """A page as text: each figure with its title, its explanation and, to be unfolded, its content in words.

    scripts: names of files in `assets`

    Raises `ValueError` where two sections or figures have one name: it is a link's target.
    """
    names: list[str] = []
    bodies = [_chapter(chapter, names) for chapter in chapters]
    if doubled := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"a page shows everything once; {doubled[0]!r} came {names.count(doubled[0])} times")
    content = "\n".join(bodies)
    return document(title, f"<header>\n<h1>{html.escape(title)}</h1>\n</header>\n{content}", scripts=scripts)


def document(title: str, body: str, *, scripts: Sequence[str] = ()) -> str:
    """A whole page that may load nothing, and run nothing but its own scripts. body: HTML; scripts: as for `page`"""
    sources = [asset(name) for name in scripts]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
        for source in sources
    )
    allowed = f"; script-src {hashes}" if hashes else ""
    running = "\n".join(f"<script>{source}</script>" for source in sources)
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'{allowed}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>
{asset("page.css")}</style>
</head>
<body>
{body}
{running}
</body>
</html>
"""


def write_page(path: Path, text: str) -> None:
    """Writes a new file. Raises `FileExistsError` where there is one: nothing is overwritten."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)


def asset(name: str) -> str:
    """The text of a file of `assets`."""
    return files("specengine.measure").joinpath("assets", name).read_text(encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    """A table that scrolls sideways where it is wider than the page."""
    titles = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scrolls" role="region" tabindex="0" aria-label="{html.escape(label)}"><table>'
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _chapter(chapter: Chapter, names: list[str]) -> str:
    pairs = [(draw("light"), draw("dark")) for draw in chapter.draws]
    entries = [(each.name, each.title) for each in chapter.sections]
    entries += [(light.name, light.title) for light, _ in pairs]
    entries += [(each.name, each.title) for each in chapter.appendix]
    names.extend(name for name, _ in entries)
    known = "\n".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in chapter.facts
    )
    links = "\n".join(f'<li><a href="#{name}">{html.escape(title)}</a></li>' for name, title in entries)
    bodies = [_section(each) for each in chapter.sections] + [_figure(*pair) for pair in pairs]
    bodies += [_section(each) for each in chapter.appendix]
    absent = "\n".join(f"<li>{html.escape(each)}</li>" for each in chapter.missing)
    return f"""{f"<h2>{html.escape(chapter.title)}</h2>" if chapter.title else ""}
{f"<dl>{known}</dl>" if known else ""}
<nav aria-label="Contents"><ul>
{links}
</ul></nav>
<main>
{chr(10).join(bodies)}
</main>
{f"<p>Not shown:</p><ul>{absent}</ul>" if absent else ""}"""


def _section(section: Section) -> str:
    name, kind = section.name, "wide long" if section.is_long else "wide"
    return f"""<section id="{name}" class="{kind}" aria-labelledby="{name}-title">
<h3 id="{name}-title">{html.escape(section.title)}</h3>
{section.html}
</section>"""


def _figure(light: Explained, dark: Explained) -> str:
    alternative = html.escape(light.alternative_text)
    return f"""<section id="{light.name}" aria-labelledby="{light.name}-title">
<h3 id="{light.name}-title" class="said">{html.escape(light.title)}</h3>
<picture>
<source media="screen and (prefers-color-scheme: dark)" srcset="{_data(dark)}">
<img src="{_data(light)}" alt="{alternative}">
</picture>
<p>{html.escape(light.explanation)}</p>
<details><summary>The figure in words</summary><p>{alternative}</p></details>
</section>"""


def _data(explained: Explained) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(explained.svg().encode()).decode()
