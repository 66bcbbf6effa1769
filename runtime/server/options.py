"""Options of a server, validated at construction."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from u2moe.runtime.server.connections import Address
from u2moe.runtime.validation import checked_integer, checked_number

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits for one client.

    Attributes:
        upload_bytes: size of an uploaded file; it is streamed to disk.
        message_bytes: size of one WebSocket message, or of the audio of one Wyoming event.
        duration_s: seconds of audio of one stream or file.
        queue_s: seconds of a stream's audio in the queue; a client that sends faster is slowed down.
        idle_s: seconds for which a client may send nothing, or too little to count (see `pace`).
        send_s: seconds for which a client may not read what it is sent.
        hotwords: number of phrases.
    """

    upload_bytes: int = 512 << 20
    message_bytes: int = 4 << 20
    duration_s: float = 4 * 3600.0
    queue_s: float = 5.0
    idle_s: float = 60.0
    send_s: float = 20.0
    hotwords: int = 1000

    def __post_init__(self) -> None:
        for name in ("upload_bytes", "message_bytes", "hotwords"):
            checked_integer(name, getattr(self, name), least=1, most=sys.maxsize)
        for name in ("duration_s", "queue_s", "idle_s", "send_s"):
            checked_number(name, getattr(self, name), above=0, unit="seconds")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server listens, and how much it accepts.

    Attributes:
        host: address to listen on, or "unix:" and the path of a socket.
        port: port of HTTP and WebSocket; 0: any free port.
        protocol_ports: further ports, each of one protocol, by its name.
        languages: language codes of the model, by which Home Assistant chooses it; empty: by its vocabulary.
        workers: number of processes, each with its own model and scheduler.
        chunk_size: encoder frames per chunk of live streams; None: as in training, or 16.
        capacity: maximum number of live streams per worker; None: measured at the start.
        max_files: files that each worker accepts at once, including waiting ones.
        limits: limits for each client.
        drain_s: seconds for running utterances to finish when the server is stopped.
        api_key: key that clients must send; None: none, or those of `keys_file`.
        keys_file: file with keys, read anew on SIGHUP; see `read_keys`.
        cors_origins: origins whose pages may use the server; "*": all.
        tls_certificate: PEM file of the certificate chain, for HTTPS and WSS.
        tls_key: PEM file of its key.
        forwarded_allow_ips: addresses or networks of proxies whose X-Forwarded-For and -Proto are believed; "*": all.
        logs_json: whether each line of the log is a JSON object.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    protocol_ports: Mapping[str, int] = field(default_factory=dict)
    languages: tuple[str, ...] = ()
    workers: int = 1
    chunk_size: int | None = None
    capacity: int | None = None
    max_files: int = 16
    limits: Limits = field(default_factory=Limits)
    drain_s: float = 30.0
    api_key: str | None = None
    keys_file: Path | None = None
    cors_origins: tuple[str, ...] = ()
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    forwarded_allow_ips: tuple[str, ...] = ()
    logs_json: bool = False

    def __post_init__(self) -> None:
        checked_integer("port", self.port, least=0, most=65535)
        for name, port in self.protocol_ports.items():
            checked_integer(f"the port of {name}", port, least=0, most=65535)
        for name in ("workers", "chunk_size", "capacity", "max_files"):
            if getattr(self, name) is not None:
                checked_integer(name, getattr(self, name), least=1)
        if self.workers > 1 and not hasattr(socket, "send_fds"):
            raise ValueError("several workers need a system that hands sockets to other processes: not Windows")
        checked_number("drain_s", self.drain_s, least=0, unit="seconds")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both the certificate and its key")
        for file in filter(None, (self.tls_certificate, self.tls_key)):
            if not file.is_file():
                raise ValueError(f"{file}: no such file, expected one in PEM for TLS")

        if self.socket_file and (self.protocol_ports or not hasattr(socket, "AF_UNIX")):
            raise ValueError("a Unix socket serves HTTP and WebSocket alone, and not on Windows")
        for proxy in self.forwarded_allow_ips:
            try:
                proxy == "*" or ipaddress.ip_network(proxy)
            except ValueError as error:
                raise ValueError(f"--forwarded-allow-ips must be an address, a network or *: {error}") from None

    @property
    def socket_file(self) -> Path | None:
        """The Unix socket to listen on instead of an address."""
        return Path(self.host.removeprefix("unix:")) if self.host.startswith("unix:") else None

    @property
    def is_behind_proxy(self) -> bool:
        """Whether clients come through a proxy, which knows the server's name."""
        return bool(self.forwarded_allow_ips or self.socket_file)

    def is_proxy(self, address: Address) -> bool:
        """Whether an address is that of a proxy."""
        return any(proxy == "*" or address in ipaddress.ip_network(proxy) for proxy in self.forwarded_allow_ips)

    @property
    def has_keys(self) -> bool:
        """Whether clients must send a key."""
        return self.api_key is not None or self.keys_file is not None

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine can reach the server."""
        return self.host in LOOPBACK or self.socket_file is not None


def check_tls(options: ServerOptions) -> None:
    """Load the certificate and its key, so that a wrong one is found before the model is loaded.

    Raises:
        ValueError: they are damaged, or do not belong together.
    """
    if options.tls_certificate is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.tls_certificate, options.tls_key)
        except (ssl.SSLError, OSError) as error:
            files = f"{options.tls_certificate}, {options.tls_key}"
            raise ValueError(f"{files}: no certificate in PEM with its key, without a password: {error}") from error
