"""Access control for all protocols: API keys, host names and origins of web pages."""

import hmac
import re
import stat
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, QueryParams
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from u2moe.runtime.server.accounts import address_of
from u2moe.runtime.server.errors import RequestError, error_response
from u2moe.runtime.server.log import REQUEST_ID, Metrics
from u2moe.runtime.server.options import LOOPBACK, ServerOptions
from u2moe.runtime.server.transport import ANSWERS
from u2moe.runtime.validation import checked_integer, refused_as

KEY_SUBPROTOCOLS = ("openai-insecure-api-key.", "u2moe-api-key.")  # before a key, as web pages cannot set headers
KEY = "u2moe.key"  # name of the scope entry with a request's API key; the entry is None if the request has no valid key
OWN_PATH = "u2moe.path"  # name of the state entry with the WebSocket path that `/` stands for, on a protocol's own port
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_READING = ("GET", "HEAD", "OPTIONS")  # no side effects; for others, the origin is checked: any page may post forms


@dataclass(frozen=True, kw_only=True)
class Key:
    """An API key."""

    name: str  # in logs and errors
    secret: str  # what clients send
    num_streams: int | None = None  # maximum number of simultaneous streams and files in each worker; None: no limit

    def __post_init__(self) -> None:
        if not (self.secret and self.secret.isascii() and self.secret.isprintable()) or " " in self.secret:
            told = "must be printable ASCII without spaces: it is sent in headers"
            raise ValueError(f"the value of the API key {self.name!r} {told}")
        if self.num_streams is not None:
            checked_integer(f"the number of streams of the key {self.name}", self.num_streams, least=1)


def read_keys(file: Path) -> tuple[Key, ...]:
    """Read the keys in a file: a single key, or lines with a name, a key and optionally a maximum number of streams.

    Raises OSError if the file cannot be read, and ValueError if it is not text in UTF-8 or has no key, an invalid line,
    or two keys with the same name or secret. The message has the file and the line number or name, but no secrets.
    """
    with refused_as(ValueError, file):
        if not stat.S_ISREG(file.stat().st_mode):  # the server would wait for data of a pipe or a device
            raise ValueError("must be a regular file")
        lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        rows = [(number, line.split()) for number, line in lines if line.strip() and line.lstrip()[0] != "#"]
        if not rows:
            raise ValueError("contains no API key")
        if len(rows) == 1 and len(rows[0][1]) == 1:
            return (Key(name="default", secret=rows[0][1][0]),)
        keys = []
        for number, row in rows:
            if len(row) not in (2, 3) or not all(part.isdecimal() for part in row[2:]):
                raise ValueError(f"line {number} must be a name, a key and optionally a maximum number of streams")
            keys.append(Key(name=row[0], secret=row[1], num_streams=int(row[2]) if len(row) == 3 else None))
        for attribute in ("name", "secret"):
            if len({getattr(key, attribute) for key in keys}) < len(keys):
                raise ValueError(f"two keys have the same {attribute}")
        return tuple(keys)


class Keys:
    """The valid API keys, `by_name`. If there are none, clients need no key."""

    def __init__(self, options: ServerOptions) -> None:
        self._file = options.keys_file
        self.by_name: Mapping[str, Key] = {}
        if self._file is None and options.api_key is not None:
            self.by_name = {"default": Key(name="default", secret=options.api_key)}
        self.reload()

    def reload(self) -> None:
        """Read the key file again, if there is one. After an error of `read_keys`, the previous keys remain valid."""
        if self._file is not None:
            self.by_name = {key.name: key for key in read_keys(self._file)}

    def find(self, candidates: Iterable[str]) -> Key | None:
        """Return the key that matches one of the candidates. Comparisons take constant time."""
        given, keys = [candidate.encode() for candidate in candidates], self.by_name.values()
        same = [key for key in keys if sum(hmac.compare_digest(each, key.secret.encode()) for each in given)]
        return same[0] if same else None


class Access:
    """Middleware that passes on allowed requests and refuses others, for example with 401 or 403.

    A client sends its key as `Authorization: Bearer KEY`, or as a WebSocket subprotocol. Clients that accept only a URL
    can send `?api_key=KEY`. The `open_paths` need no key. Pages of another origin may use the server only if the origin
    is listed, or through the WebSocket on a protocol's own port. Otherwise, they can only send GET, HEAD and OPTIONS
    requests, and cannot read the responses. A server that only this machine can reach accepts only loopback names in
    the Host header. Without this check, a page could make its own host name resolve to this machine, and then send
    same-origin requests (DNS rebinding).
    """

    def __init__(
        self, app: ASGIApp, options: ServerOptions, metrics: Metrics, keys: Keys, open_paths: frozenset[str]
    ) -> None:
        self._app, self._metrics, self._keys = app, metrics, keys
        self._origins, every = frozenset(options.cors_origins), ["*"]
        # refusals get CORS headers too, so that allowed pages can read the reason
        self._guarded = CORSMiddleware(self._guard, options.cors_origins, allow_methods=every, allow_headers=every)
        self._is_local = options.is_local and not options.is_behind_proxy
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request to the application or refuse it. The response and the log contain the request's id."""
        if scope["path"].startswith(("http://", "https://")):  # the form for requests through a proxy
            scope = {**scope, "path": _parts_of(scope["path"]).path or "/"}
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        REQUEST_ID.set(name)

        async def send_with_id(message: Message) -> None:
            if message["type"] in ANSWERS:
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        await self._guarded(scope, receive, send_with_id)

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        host, origin = _parts_of(f"//{headers.get('host', '')}").hostname or "localhost", headers.get("origin")
        may_connect = origin is None or {"*", origin} & self._origins or _parts_of(origin).netloc == headers.get("host")
        path = scope["state"][OWN_PATH] if scope["path"] == "/" else None
        is_own = path is not None and scope["type"] == "websocket"
        key = self._keys.find(_candidates(headers, scope))
        is_open = scope["type"] != "websocket" and scope["path"] in self._open_paths
        needs_key = self._keys.by_name and scope.get("method") != "OPTIONS" and not is_open
        if "transfer-encoding" in headers and "content-length" in headers:  # a proxy might use the other length
            told = "a request may have Transfer-Encoding or Content-Length, not both"
            refusal = error_response(RequestError(told, code="length"), 400, {"Connection": "close"})
            await refusal(scope, receive, send)
        elif self._is_local and host not in LOOPBACK and not getattr(address_of(host), "is_loopback", False):
            told = "this server only answers to the host name localhost; behind a proxy it needs --forwarded-allow-ips"
            await self._refuse("host", 403, told, "host")(scope, receive, send)
        elif scope.get("method") not in _READING and not is_own and not may_connect:
            told = "pages of this origin may not use the server"
            await self._refuse("origin", 403, told, "origin")(scope, receive, send)
        elif key is None and needs_key:
            told = "the API key is missing or wrong"
            await self._refuse("key", 401, told, "invalid_api_key")(scope, receive, send)
        else:
            place = {"path": path, "raw_path": path.encode()} if path is not None and is_own else {}
            await self._app({**scope, KEY: key, **place}, receive, send)

    def _refuse(self, reason: str, status: int, told: str, code: str) -> Response:
        self._metrics.refuse(reason)
        return error_response(RequestError(told, code=code), status)


def _parts_of(url: str) -> SplitResult:
    """Return the parts of a URL. An invalid URL gets a host name that matches nothing."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("//.")


def _candidates(headers: Headers, scope: Scope) -> list[str]:
    """Return the keys that a request contains, valid or not."""
    given = [QueryParams(scope["query_string"]).get("api_key", "")]
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        given.append(value.strip())
    for name in scope.get("subprotocols", []):
        given += [name.removeprefix(prefix) for prefix in KEY_SUBPROTOCOLS if name.startswith(prefix)]
    return given
