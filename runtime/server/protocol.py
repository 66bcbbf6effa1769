"""Class that describes a protocol, admits and closes its WebSockets, and handles their errors."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.routing import Route
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketDisconnected, WebSocketState

from u2moe.runtime.errors import U2moeError
from u2moe.runtime.server.access import KEY, KEY_SUBPROTOCOLS
from u2moe.runtime.server.connection import Connection
from u2moe.runtime.server.errors import ClientGoneError, RecognitionError, RequestError, StoppingError
from u2moe.runtime.server.service import Service

_MAX_REASON = 120  # maximum bytes of the reason for closing a WebSocket; RFC 6455 allows 123
_GONE = (ClientGoneError, WebSocketDisconnect, WebSocketDisconnected)

Conversation = Coroutine[Any, Any, None]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A protocol over a WebSocket (`path` and `run`), over TCP (`run_tcp`), or over HTTP (`routes`)."""

    name: str  # in options, metrics and logs
    path: str | None = None  # of its WebSocket
    run: Callable[[Connection], Conversation] | None = None  # serves one client; errors are reported to it
    # serves one client over TCP, and reports errors itself
    run_tcp: Callable[[Service, asyncio.StreamReader, asyncio.StreamWriter], Conversation] | None = None
    routes: Callable[[Service], list[Route]] | None = None
    may_have_port: bool = False  # whether `--protocol` can assign a port, for clients that cannot set a path
    tell_error: Callable[[Exception], Mapping[str, Any]] | None = None  # returns JSON for the client; None: not sent
    close_code: int = RequestError.close_code  # for client errors that have no close code of their own
    subprotocols: tuple[str, ...] = ()  # in order of preference

    async def serve(self, service: Service, websocket: WebSocket) -> None:
        """Serve a client if a slot is free. Errors are reported to the client and end the connection."""
        with contextlib.suppress(*_GONE, OSError, TimeoutError):
            code, reason = await self._serve_to_the_end(service, websocket)
            async with asyncio.timeout(service.options.limits.send_s):
                await websocket.close(code, reason.encode()[:_MAX_REASON].decode(errors="ignore"))

    async def _serve_to_the_end(self, service: Service, websocket: WebSocket) -> tuple[int, str]:
        """Serve a client; return the code and the reason for closing the connection."""
        if self.run is None:
            raise TypeError(f"the protocol {self.name} does not use WebSockets")
        offered = websocket.scope["subprotocols"]
        keys = (name for name in offered if name.startswith(KEY_SUBPROTOCOLS))
        # browsers disconnect if none is chosen, even if they offer only one that contains their key
        subprotocol = next((name for name in self.subprotocols if name in offered), None) or next(keys, None)
        try:
            with service.slot(self.name, websocket.scope[KEY]) as slot:
                await websocket.accept(subprotocol)
                slot.model = service.model(websocket.query_params.get("model"))
                await self.run(Connection(websocket, service, slot))
            return (StoppingError.close_code, str(StoppingError())) if slot.is_drained else (1000, "")
        except U2moeError as error:
            service.incidents.fail(error)
            if websocket.application_state == WebSocketState.CONNECTING:
                await websocket.accept(subprotocol)  # web pages see the reason only on an accepted connection
            if self.tell_error is not None:
                async with asyncio.timeout(service.options.limits.send_s):
                    await websocket.send_text(json.dumps(self.tell_error(error), ensure_ascii=False))
            code = getattr(error, "close_code", RequestError.close_code)
            return self.close_code if code == RequestError.close_code else code, str(error)
        except _GONE:
            raise
        except Exception as error:  # noqa: BLE001 - a bug ends one connection, not the server
            service.incidents.bug(f"a connection ({self.name})", error)
            return RecognitionError.close_code, "internal server error"
