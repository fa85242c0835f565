"""Headless Chromium for tests of pages: what a page asked of the network, and what it complained of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_TIMEOUT = 120_000  # milliseconds: a busy machine's
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")


@dataclass
class Opened:
    """A page. requests: every address that it asked for, itself included; complaints: of its console, and errors."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def shot(self, path: Path) -> None:
        self.page.screenshot(path=path, full_page=True)


@contextmanager
def browser() -> Iterator[Any]:
    """A browser to be given to `open_page`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A GPU that is imitated in software takes ten times as long on some processors.
        arguments = ["--no-sandbox", "--disable-gpu"]
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield launched
        finally:
            launched.close()


def open_page(launched: Any, path: Path, *, width: int = 1280, scheme: str = "light") -> Opened:
    """A file in a window `width` wide."""
    return open_address(launched, path.absolute().as_uri(), width=width, scheme=scheme)


def open_address(launched: Any, address: str, *, width: int = 1280, scheme: str = "light") -> Opened:
    """The same for whatever a browser can go to."""
    page = launched.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(_TIMEOUT)
    opened = Opened(page)
    page.on("request", lambda request: opened.requests.append(request.url))
    page.on("console", lambda message: opened.complaints.append(message.text))
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    page.goto(address)
    page.wait_for_load_state("load")
    return opened


# The lowest contrast of any text on the page to what is behind it (WCAG 2.1), and that text.
LOWEST_CONTRAST = """() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return { r, g, b, a };
  };
  const luminance = ({ r, g, b }) => {
    const part = (value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    };
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.a === 1) return colour;
      if (colour.a > 0) throw new Error("a background that lets something through");
    }
    return { r: 255, g: 255, b: 255 };
  };
  let lowest = [21, ""];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("script, style")) continue;
    const [one, other] = [parse(getComputedStyle(element).color), behind(element)].map(luminance);
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < lowest[0]) lowest = [ratio, element.textContent.slice(0, 60)];
  }
  return lowest;
}"""
