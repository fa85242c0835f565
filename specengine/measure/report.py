"""One page of figures: a single HTML file that needs no network and no script, light or dark as its reader prefers."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import Path

from specengine.measure.figures import Explained, Style

# Draws a figure in a style; the functions of `figures` with their data: `partial(acceptance_by_k, rates)`.
Draw = Callable[[Style], Explained]

_CSS = """\
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --faint: #55585f; --line: #d9d9d9; --link: #0068a8 }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #f0f0f0; --paper: #16181d; --faint: #b9bdc6; --line: #3a3f4a; --link: #63bdf0 }
}
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: var(--paper);
       font: 1rem/1.5 system-ui, sans-serif }
a { color: var(--link) }
main { display: grid; gap: 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
section { border-top: 1px solid var(--line); break-inside: avoid }
h2 { font-size: 1.15rem }
img { display: block; width: 100%; max-width: 36rem; height: auto }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; color: var(--faint) }
dd { margin: 0; overflow-wrap: anywhere }
@media print { main { display: block } nav { display: none } img { max-height: 16cm; width: auto; max-width: 100% } }
"""


def page(title: str, draws: Sequence[Draw], facts: Sequence[tuple[str, str]] = ()) -> str:
    """A page as text: each figure with its title, its explanation and, to be unfolded, its content in words.

    draws: each figure, to be drawn twice, light and dark; a name may come once, since it is a link's target
    facts: names and values shown above the figures: models, machine, versions

    Raises `ValueError` where two figures have one name.
    """
    pairs = [(draw("light"), draw("dark")) for draw in draws]
    names = [light.name for light, _ in pairs]
    if doubled := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(
            f"a page shows each figure once; {doubled[0]!r} came {names.count(doubled[0])} times"
        )
    links = "\n".join(
        f'<li><a href="#{light.name}">{html.escape(light.title)}</a></li>' for light, _ in pairs
    )
    known = "\n".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts)
    sections = "\n".join(_section(light, dark) for light, dark in pairs)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>
{_CSS}</style>
</head>
<body>
<header>
<h1>{html.escape(title)}</h1>
{f"<dl>{known}</dl>" if known else ""}
<nav aria-label="Figures"><ul>
{links}
</ul></nav>
</header>
<main>
{sections}
</main>
</body>
</html>
"""


def write_page(path: Path, title: str, draws: Sequence[Draw], facts: Sequence[tuple[str, str]] = ()) -> None:
    """Writes `page` to a new file. Raises `FileExistsError` where there is one: nothing is overwritten."""
    text = page(title, draws, facts)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)


def _section(light: Explained, dark: Explained) -> str:
    alternative = html.escape(light.alternative_text)
    return f"""<section id="{light.name}" aria-labelledby="{light.name}-title">
<h2 id="{light.name}-title">{html.escape(light.title)}</h2>
<picture>
<source media="screen and (prefers-color-scheme: dark)" srcset="{_data(dark)}">
<img src="{_data(light)}" alt="{alternative}">
</picture>
<p>{html.escape(light.explanation)}</p>
<details><summary>The figure in words</summary><p>{alternative}</p></details>
</section>"""


def _data(explained: Explained) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(explained.svg().encode()).decode()
