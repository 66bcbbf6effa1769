"""Options of a server, validated at construction."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT_PROTOCOLS = ("wenet", "sherpa", "sherpa-offline", "vosk")
"""Protocols whose clients cannot name a path: each can have `/` on its own port."""

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits for one client.

    Attributes:
        upload_bytes: size of an uploaded file; it is streamed to disk.
        message_bytes: size of one WebSocket message, or of one Wyoming event.
        duration_s: seconds of audio of one stream or file.
        queue_s: seconds of a stream's audio in the queue; a client that sends faster is slowed down.
        idle_s: seconds for which a client may send nothing, or too little to count (see `patience`).
        send_s: seconds for which a client may not read what it is sent.
        hotwords: number of phrases.
    """

    upload_bytes: int = 512 << 20
    message_bytes: int = 16 << 20
    duration_s: float = 4 * 3600.0
    queue_s: float = 5.0
    idle_s: float = 60.0
    send_s: float = 20.0
    hotwords: int = 1000

    def __post_init__(self) -> None:
        for name in ("upload_bytes", "message_bytes", "hotwords"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("duration_s", "queue_s", "idle_s", "send_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number of seconds above 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server listens, and how much it accepts.

    Attributes:
        host: address to listen on.
        port: port of HTTP and WebSocket; 0: any free port.
        protocol_ports: further ports, by the protocol (`ROOT_PROTOCOLS`) at `/`.
        wyoming_port: port for Home Assistant; None: none.
        languages: language codes of the model, by which Home Assistant chooses it; empty: by its vocabulary.
        workers: number of processes, each with its own model and scheduler.
        capacity: live streams per worker; None: measured at the start.
        file_threads: files that each worker recognises at once.
        max_files: files that each worker accepts at once, including waiting ones.
        limits: limits for each client.
        drain_s: seconds for running utterances to finish when the server is stopped.
        api_key: key that clients must send; None: none.
        cors_origins: origins whose pages may use the server; "*": all.
        tls_certificate: PEM file of the certificate chain, for HTTPS and WSS.
        tls_key: PEM file of its key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    protocol_ports: Mapping[str, int] = field(default_factory=dict)
    wyoming_port: int | None = None
    languages: tuple[str, ...] = ()
    workers: int = 1
    capacity: int | None = None
    file_threads: int = 1
    max_files: int = 16
    limits: Limits = field(default_factory=Limits)
    drain_s: float = 30.0
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    tls_certificate: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        for name, port in (("port", self.port), ("wyoming_port", self.wyoming_port), *self.protocol_ports.items()):
            if port is not None and not 0 <= port <= 65535:
                place = name if name.endswith("port") else f"the port of {name}"
                raise ValueError(f"{place} must be between 0 and 65535, got {port}")
        for protocol in self.protocol_ports:
            if protocol not in ROOT_PROTOCOLS:
                raise ValueError(f"a protocol of a port must be one of {', '.join(ROOT_PROTOCOLS)}, got {protocol!r}")
        for name, value in (
            ("workers", self.workers),
            ("capacity", self.capacity),
            ("file_threads", self.file_threads),
            ("max_files", self.max_files),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.workers > 1 and not hasattr(socket, "send_fds"):
            raise ValueError("several workers need a system that hands sockets to other processes: not Windows")
        if not 0 <= self.drain_s < math.inf:
            raise ValueError(f"drain_s must be a number of seconds, at least 0, got {self.drain_s}")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("the API key is empty")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("the API key must be printable ASCII: it is sent in HTTP headers")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both the certificate and its key")
        for file in filter(None, (self.tls_certificate, self.tls_key)):
            if not file.is_file():
                raise ValueError(f"{file}: no such file, expected one in PEM for TLS")
        if self.api_key is not None and self.wyoming_port is not None and not self.is_local:
            raise ValueError("Wyoming knows no API key: with one, its port may only be opened on the loopback address")

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine can reach the server."""
        return self.host in _LOOPBACK
