"""The page at `/`: files that are read once and answered as they are to whoever asks, with a policy that lets them load
nothing but each other, and ask nobody but this server.

They say nothing that is anybody's: what the page shows it asks for as every client does, with the key where there is
one.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI, Response

from specengine.measure.report import document
from specengine.measure.token_view import SCRIPT

_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_FILES = (
    "style.css",
    "icon.svg",
    "page.js",
    "client.js",
    "transcript.js",
    "charts.js",
    "session.js",
)
# Where a session's report is put into the frame that it has in common with `specengine report`.
REPORT_BODY = "<!-- the session -->"
_FOLDER = "/page/"
PATHS = ("/", *(_FOLDER + name for name in (*_FILES, "report.html")))
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Adds a route for each of `PATHS`. None is a part of the interface that `/openapi.json` describes."""
    folder = files("specengine.server").joinpath("static")
    contents = {_FOLDER + name: folder.joinpath(name).read_text(encoding="utf-8") for name in _FILES}
    contents["/"] = folder.joinpath("index.html").read_text(encoding="utf-8")
    contents[_FOLDER + "report.html"] = document(
        "Speculative decoding, a session", REPORT_BODY, scripts=[SCRIPT]
    )
    for path, content in contents.items():
        ending = path.rpartition(".")[2] if path != "/" else "html"
        _add_file(app, path, content.encode(), _MEDIA_TYPES[ending])


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def answer() -> Response:
        """The whole of it, whatever range is asked for."""
        return Response(content, media_type=media_type, headers=_HEADERS)
