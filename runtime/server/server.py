"""The server in one process: its connections, which uvicorn serves, and its ASGI application with all routes."""

import asyncio
import contextlib
import functools
import json
import math
import multiprocessing
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from u2moe.runtime.server.access import OWN_PATH, Access
from u2moe.runtime.server.accounts import Connections, allowed_connections
from u2moe.runtime.server.errors import RequestError, error_response
from u2moe.runtime.server.log import LOGGER, Metrics
from u2moe.runtime.server.models import REQUEST_OPTIONS
from u2moe.runtime.server.options import check_tls
from u2moe.runtime.server.protocols import PROTOCOLS
from u2moe.runtime.server.protocols.rest import RESPONSE_FORMATS
from u2moe.runtime.server.protocols.wyoming import LINE_BYTES
from u2moe.runtime.server.service import Service
from u2moe.runtime.server.transport import CONNECTION, PacedConnection, charged

_PING_S = 5.0  # seconds between pings, which detect a lost client even while much of the client's data is unread
_HANDSHAKE_S = 20.0
_GRACE_S = 5  # seconds for connections to close when the server stops
_ACCEPTED_AT_ONCE = 16
_NO_DESCRIPTORS_S = 0.5
_LEFT_TO_OTHERS_S = 0.005  # seconds for which new connections are left to workers with more free slots
_DOUBT_S = 3.0  # other workers leave connections to a worker until its last heartbeat was so many seconds ago
_MEDIA_TYPES = {
    ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml",
    ".json": "application/json", ".wasm": "application/wasm",
}  # fmt: skip
_JSON_TYPES = {"integer": "integer", "number": "number", "flag": "boolean", "record": "array"}
_PAGE = resources.files("u2moe.runtime.server.page")
_MODULE = resources.files("u2moe.runtime.server.page.u2moe")  # runtime/web: the microphone and the resampler
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; connect-src 'self' ws: wss:; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class Server:
    """The server in one process, worker `number` of those that share sockets. It calls `ready` when it is."""

    def __init__(self, service: Service, ready: Callable[[], object], number: int = 0) -> None:
        options = service.options
        self._service, self._ready, self._number = service, ready, number
        self._config = uvicorn.Config(
            make_app(service),
            http="h11",  # unlike uvicorn's other parser, h11 limits the size of headers
            ws="websockets-sansio",
            ws_max_size=options.limits.message_bytes,
            ws_ping_interval=_PING_S,
            ws_ping_timeout=None,  # pongs may wait behind audio; the idle timeout finds clients that have disconnected
            ws_per_message_deflate=False, lifespan="off", log_config=None, access_log=False, server_header=False,
            log_level="critical",  # lower levels report errors of clients; the application logs internal errors
            proxy_headers=options.is_behind_proxy,
            forwarded_allow_ips=["*"] if options.socket_file else list(options.forwarded_allow_ips),
            timeout_graceful_shutdown=_GRACE_S,
            timeout_keep_alive=60,  # `check` is earlier, and knows of data that must wait
            ssl_certfile=options.tls_certificate, ssl_keyfile=options.tls_key,
        )  # fmt: skip
        self._config.load()  # takes a tenth of a second, so not when the server already says that it is ready
        self._uvicorn = uvicorn.Server(self._config)
        self._stopping = asyncio.Event()
        self._sockets: Mapping[str, socket.socket] = {}
        self.served: set[PacedConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()  # tasks of connections that are starting or do not use HTTP
        self.connections = Connections(allowed_connections(), options.is_proxy)
        self.connections.tell_new = functools.partial(service.metrics.set, "newcomers")

    async def run_on(self, sockets: Mapping[str, socket.socket]) -> None:
        """Serve on listening sockets by protocol until `stop` is called, then let streams in progress finish."""
        self._sockets = sockets
        loop = asyncio.get_running_loop()
        await self._service.start()
        self.connections.is_decoding = lambda: self._service.scheduler.is_decoding
        looking = asyncio.create_task(self._look_after())  # without a first heartbeat, a silent worker would live on
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[]))
        try:
            await asyncio.sleep(0)  # lets uvicorn install its signal handlers, which `ready` replaces
            loop.set_exception_handler(self._log_error)
            self._listen()
            if (parent := multiprocessing.parent_process()) is not None:
                loop.add_reader(parent.sentinel, self._stop_without_parent, parent.sentinel)
            self._ready()
            await self._stopping.wait()
            await self._service.drain()
            self.close_sockets()
            for task in self._tasks:
                task.cancel()
            self._uvicorn.should_exit = True
            await serving
            looking.cancel()
            for connection in list(self.served):
                connection.abort()
            await asyncio.sleep(0.01)  # lets the callbacks of aborted connections run
        finally:
            self._service.stop()

    def _log_error(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error that asyncio could not report to any caller."""
        error = context.get("exception")
        self._service.metrics.fail(error if isinstance(error, Exception) else RuntimeError())

    def _accept(self, speaks: str, listening: socket.socket) -> None:
        """Accept connections, a few in each turn of the event loop."""
        for _ in range(_ACCEPTED_AT_ONCE):
            if have_others_room(self._service.metrics, self._number):
                self._pause(_LEFT_TO_OTHERS_S)
                return
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError:  # no free file descriptors
                self._service.metrics.refuse("connections")
                self._pause(_NO_DESCRIPTORS_S)
                return
            connection.setblocking(False)  # noqa: FBT003
            self._take(speaks, connection)

    def _pause(self, seconds: float) -> None:
        """Stop accepting connections for this many seconds."""
        loop = asyncio.get_running_loop()
        for listening in self._sockets.values():
            loop.remove_reader(listening)
        loop.call_later(seconds, self._listen)

    def _listen(self) -> None:
        for speaks, listening in self._sockets.items():
            asyncio.get_running_loop().add_reader(listening, self._accept, speaks, listening)

    def close_sockets(self) -> None:
        """Close the listening sockets."""
        self._pause(0.0)
        for listening in self._sockets.values():
            listening.close()
        self._sockets = {}

    def _take(self, speaks: str, accepted: socket.socket) -> None:
        """Serve a new connection, after a wait if its address has a high debt. Close it if `connections` refuses it."""
        visit = self.connections.enter(accepted)
        if visit is None:
            self._service.metrics.refuse("connections")
            accepted.close()
            return
        run_tcp = PROTOCOLS[speaks].run_tcp if speaks in PROTOCOLS else None
        connection = PacedConnection(visit, self.served, self._service.metrics.fail, is_http=run_tcp is None)
        if run_tcp is not None:
            visit.settle()  # not counted as new: it may not become a stream for a long time
            reader = asyncio.StreamReader(LINE_BYTES)
            connection.inner = asyncio.StreamReaderProtocol(
                reader, lambda _, writer: self._spawn(charged(run_tcp(self._service, reader, writer), visit))
            )

        def drop_unless_served(_begun: asyncio.Task[None]) -> None:  # the task may be cancelled before its first step
            if connection not in self.served:
                visit.leave()
                accepted.close()

        self._spawn(self._begin(connection, speaks, accepted)).add_done_callback(drop_unless_served)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _begin(self, connection: PacedConnection, speaks: str, accepted: socket.socket) -> None:
        """Pass a connection to its protocol."""
        tls, limit_s = (self._config.ssl, _HANDSHAKE_S) if connection.is_http and self._config.ssl else (None, None)
        with contextlib.suppress(OSError):  # the TLS handshake failed
            if wait_s := connection.visit.wait_s(time.monotonic()):
                await asyncio.sleep(wait_s)
            if connection.is_http:
                speak_http: Callable[..., asyncio.BaseProtocol] = self._config.http_protocol_class
                state = {OWN_PATH: PROTOCOLS[speaks].path if speaks in PROTOCOLS else None, CONNECTION: connection}
                connection.inner = speak_http(self._config, self._uvicorn.server_state, app_state=state)
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(lambda: connection, accepted, ssl=tls, ssl_handshake_timeout=limit_s)

    def _stop_without_parent(self, sentinel: int) -> None:
        asyncio.get_running_loop().remove_reader(sentinel)
        self.stop()

    async def _look_after(self) -> None:
        """Update the heartbeat and check connections once a second."""
        while True:
            self._service.metrics.set("heartbeats", time.monotonic())
            self.connections.looked_s = time.thread_time()
            for connection in list(self.served):
                connection.check(time.monotonic())
            await asyncio.sleep(1.0)

    def stop(self) -> None:
        """Have the server stop once the utterances and files in progress have finished."""
        LOGGER.info("stopping: running utterances and files are finished first")
        self._stopping.set()

    def reload(self) -> None:
        """Reload the keys, then the certificate, for new connections. After an error, nothing further changes."""
        options = self._service.options
        try:
            self._service.keys.reload()
            if options.tls_certificate is not None and self._config.ssl is not None:
                check_tls(options)
                self._config.ssl.load_cert_chain(options.tls_certificate, options.tls_key)
        except (OSError, ValueError) as error:
            LOGGER.error("cannot reload keys and certificate: %s", error)
        else:
            LOGGER.info("reloaded keys and certificate")


def have_others_room(metrics: Metrics, number: int) -> bool:
    """Return whether a responsive worker has clearly more free slots than worker `number`."""
    columns = ("ready", "heartbeats", "capacity", "streams", "newcomers")
    now, workers = time.monotonic(), zip(*map(metrics.each, columns), strict=True)
    rooms = [
        capacity - streams - newcomers if is_ready and now - beat < _DOUBT_S else -math.inf
        for is_ready, beat, capacity, streams, newcomers in workers
    ]
    own, most = rooms[number], max(rooms)
    return most > own + max(own, 0) / 4


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
        if protocol.path is not None and protocol.run is not None:
            routes.append(WebSocketRoute(protocol.path, functools.partial(protocol.serve, service, protocol.run)))
    routes.append(WebSocketRoute("/{path:path}", error_response(RequestError("no protocol has this path"), 404)))
    open_paths = frozenset({*(route.path for route in page), "/healthz", "/readyz"})
    inner = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})
    access = Access(inner, service.options, service.metrics, service.keys, open_paths)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await scope["state"][CONNECTION].serve(access, scope, receive, send)
        except OSError:  # the client disconnected
            raise
        except Exception as error:  # a U2moeError truncates a response that has begun
            service.metrics.fail(error, "a request")
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
