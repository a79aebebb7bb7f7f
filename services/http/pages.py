"""The playground's pages: three files from this package, kept in memory."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PAGES = {  # path -> file, type
    "/": ("index.html", "text/html"),
    "/playground.css": ("playground.css", "text/css"),
    "/playground.js": ("playground.js", "text/javascript"),
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes() -> list[Route]:
    """Anyone may load them: they hold no data, and ask for it with the token they are given."""
    folder = files("services.http") / "playground"
    return [
        _route(path, (folder / name).read_bytes(), kind) for path, (name, kind) in PAGES.items()
    ]


def _route(path: str, content: bytes, kind: str) -> Route:
    async def page(request: Request) -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return Route(path, page, methods=["GET"])
