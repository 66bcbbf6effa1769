"""The application: which path serves which protocol."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute

from u2moe.runtime.server.access import Access, RootProtocols
from u2moe.runtime.server.connection import serve_websocket
from u2moe.runtime.server.errors import RequestError
from u2moe.runtime.server.protocols import live, realtime, rest, sherpa, sherpa_offline, vosk, wenet

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from u2moe.runtime.server.service import Service

_PATHS = {
    "/stream": live.PROTOCOL,
    "/v1/realtime": realtime.PROTOCOL,
    "/wenet": wenet.PROTOCOL,
    "/sherpa": sherpa.PROTOCOL,
    "/sherpa-offline": sherpa_offline.PROTOCOL,
    "/vosk": vosk.PROTOCOL,
}
_MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".json": "application/json",
}
_PAGE = resources.files("u2moe.runtime.server.page")
_SOUND = resources.files("u2moe.runtime.server.page.sound")
"""Of the module in runtime/web: resamples for the page."""
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def make_app(service: Service, root_protocols: Mapping[int, str] | None = None) -> ASGIApp:
    """The application for a running service.

    Args:
        service: shared by all protocols.
        root_protocols: the protocol at `/`, by port.
    """
    page = _page()
    routes = [
        *rest.routes(service),
        *(WebSocketRoute(path, partial(serve_websocket, protocol, service)) for path, protocol in _PATHS.items()),
        *page,
        *_operation(service),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})
    guarded = Access(
        app,
        service.metrics,
        api_key=service.options.api_key,
        origins=service.options.cors_origins,
        open_paths=frozenset({*(route.path for route in page), "/healthz", "/readyz"}),
    )
    return RootProtocols(guarded, root_protocols or {})


def _operation(service: Service) -> list[Route]:
    """Routes for operators of the server."""

    async def healthz(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        return PlainTextResponse("ready\n" if service.is_ready else "not ready\n", 200 if service.is_ready else 503)

    async def metrics(_request: Request) -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", metrics)]


def _page() -> list[Route]:
    """A route for each file of the page; its first is `/`. Parts of the module have the paths that it gives them."""
    files = {"" if file.name == "index.html" else file.name: file for file in _PAGE.iterdir()}
    files |= {f"u2moe/sound/{file.name}": file for file in _SOUND.iterdir()}
    return [
        Route(f"/{path}", _respond_with(file)) for path, file in files.items() if Path(file.name).suffix in _MEDIA_TYPES
    ]


def _respond_with(file: Traversable) -> Callable[[Request], Awaitable[Response]]:
    content = file.read_bytes()
    media_type = _MEDIA_TYPES[Path(file.name).suffix]

    async def respond(_request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

    return respond


async def _http_error(_request: Request, error: Exception) -> Response:
    """Errors for unknown paths and methods, in the form of all other errors."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = str(error.detail) if isinstance(error, HTTPException) else str(error)
    return rest.error_response(RequestError(message), status)
