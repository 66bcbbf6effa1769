"""The ASGI application: routes for the protocols, for the web page, and for the server's operators."""

import json
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from u2moe.runtime.errors import U2moeError
from u2moe.runtime.server.access import Access
from u2moe.runtime.server.errors import RequestError, error_response
from u2moe.runtime.server.models import REQUEST_OPTIONS
from u2moe.runtime.server.protocols.rest import RESPONSE_FORMATS
from u2moe.runtime.server.protocols.table import PROTOCOLS
from u2moe.runtime.server.service import Service
from u2moe.runtime.server.transport import CONNECTION

_MEDIA_TYPES = {
    ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml",
    ".json": "application/json", ".wasm": "application/wasm",
}  # fmt: skip
_JSON_TYPES = {"integer": "integer", "number": "number", "flag": "boolean", "record": "array"}
_PAGE = resources.files("u2moe.runtime.server.page")
_MODULE = resources.files("u2moe.runtime.server.page.u2moe")
"""The JavaScript module in runtime/web, with the microphone and the resampler."""
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; connect-src 'self' ws: wss:; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def make_app(service: Service) -> ASGIApp:
    """Return the application for a running service."""
    page = _page()

    async def readyz(_request: Request) -> Response:
        return PlainTextResponse("ready\n" if service.is_ready else "not ready\n", 200 if service.is_ready else 503)

    async def metrics(_request: Request) -> Response:
        return PlainTextResponse(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    alive = Route("/healthz", PlainTextResponse("ok\n"), methods=["GET"])
    routes: list[BaseRoute] = [*page, alive, Route("/readyz", readyz), Route("/metrics", metrics)]
    for protocol in PROTOCOLS.values():
        if protocol.routes is not None:
            routes += protocol.routes(service)
        if protocol.path is not None:
            routes.append(WebSocketRoute(protocol.path, partial(protocol.serve, service)))
    open_paths = frozenset({*(route.path for route in page), "/healthz", "/readyz"})
    inner = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})
    access = Access(inner, service.options, service.incidents, service.keys, open_paths)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await scope["state"][CONNECTION].serve(access, scope, receive, send)
        except OSError:  # the client disconnected
            raise
        except U2moeError as error:  # the response has begun, so it is truncated
            service.incidents.fail(error)
            raise
        except Exception as error:
            service.incidents.bug("a request", error)
            raise

    return app


def _page() -> list[Route]:
    """Return a route for each file of the page, and one under `/u2moe/` for each file of the JavaScript module."""
    files = {"" if file.name == "index.html" else file.name: file for file in _PAGE.iterdir()}
    files |= {f"u2moe/{file.name}": file for file in _MODULE.iterdir() if file.name.endswith((".js", ".wasm"))}
    routes = []
    for path, file in files.items():
        if media_type := _MEDIA_TYPES.get(Path(file.name).suffix):
            content = _openapi(file.read_bytes()) if file.name == "openapi.json" else file.read_bytes()
            answer = Response(content, media_type=media_type, headers=_PAGE_HEADERS)
            routes.append(Route(f"/{path}", answer, methods=["GET"]))
    return routes


async def _http_error(_request: Request, error: Any) -> Response:
    """Return the response to an unknown path or method, in the same form as other errors."""
    return error_response(RequestError(error.detail), error.status_code, error.headers)


def _openapi(constant: bytes) -> bytes:
    """Return the OpenAPI document. `constant` is its JSON without the declared options and formats."""
    found = json.loads(constant)
    body = found["paths"]["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]["multipart/form-data"]
    body["schema"]["properties"]["response_format"]["enum"] = list(RESPONSE_FORMATS)
    for name, declared in REQUEST_OPTIONS.items():
        schema = {"type": _JSON_TYPES[declared.kind], "description": declared.about}
        limits = {"minimum": declared.least, "maximum": declared.most}
        body["schema"]["properties"][name] = schema | {key: each for key, each in limits.items() if each is not None}
    return json.dumps(found).encode()
