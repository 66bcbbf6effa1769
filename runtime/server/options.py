"""Options of the server, validated on construction."""

import ipaddress
import socket
import ssl
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from u2moe.runtime.declarations import Checked, option, options_of
from u2moe.runtime.server.accounts import Address
from u2moe.runtime.validation import refused_as

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Limits(Checked):
    """Limits for one client.

    Attributes:
        upload_bytes: maximum size of an uploaded file, which is streamed to disk.
        message_bytes: maximum size of a WebSocket message, or of the audio in a Wyoming event.
        duration_s: maximum seconds of audio in a stream or file.
        queue_s: maximum seconds of audio in the queue of a stream; a client that sends faster is slowed down.
        idle_s: seconds in which a client must send audio that lasts at least a hundredth of this time.
        send_s: seconds in which a client must read what the server sends.
        hotwords: maximum number of phrases.
        hotword_letters: maximum number of characters in all phrases.
    """

    upload_bytes: int = option("integer", 512 << 20, least=1, most=sys.maxsize)
    message_bytes: int = option("integer", 4 << 20, least=1, most=sys.maxsize)
    duration_s: float = option("number", 14400.0, above=0, unit="seconds", flag="--max-duration", metavar="S")
    queue_s: float = option("number", 5.0, above=0, unit="seconds")
    idle_s: float = option("number", 60.0, above=0, unit="seconds", flag="--idle-timeout", metavar="S")
    send_s: float = option("number", 20.0, above=0, unit="seconds")
    hotwords: int = option("integer", 1000, least=1)
    hotword_letters: int = option("integer", 30_000, least=1)


@dataclass(frozen=True, kw_only=True)
class ServerOptions(Checked):
    """Addresses, limits, keys, TLS and log format of a server.

    Attributes:
        host: address to listen on, or "unix:" and the path of a socket; 127.0.0.1: only this machine.
        port: port for HTTP and WebSocket; 0: any free port.
        languages: code of a language that the model recognises; Home Assistant selects models by it. None: inferred
            from the model's vocabulary.
        workers: number of processes, each with its own model and scheduler.
        chunk_size: encoder frames per chunk of live streams. None: as in training, or 16.
        capacity: maximum number of live streams per worker. None: measured at startup.
        max_files: maximum number of files per worker, including waiting ones.
        drain_s: seconds that a stopping server waits for utterances and files in progress.
        cors_origins: origin whose pages may use the server; "*": all. None: none.
        tls_certificate: PEM file with the certificate chain, for HTTPS and WSS. None: no encryption.
        tls_key: PEM file with the private key of the certificate. None: none.
        forwarded_allow_ips: address or network of a proxy whose X-Forwarded-For and -Proto are trusted; "*": all.
            None: none.
        log_format: "json": each line of the log is a JSON object.
    """

    host: str = option("text", "127.0.0.1", flag="--host")
    port: int = option("integer", 8000, least=0, most=65535, flag="--port", metavar="PORT")
    protocol_ports: Mapping[str, int] = field(default_factory=dict)  # additional ports that serve only one protocol
    languages: tuple[str, ...] = option("texts", (), flag="--language", metavar="CODE")
    workers: int = option("integer", 1, least=1, flag="--workers", metavar="N")
    chunk_size: int | None = option("integer", least=1, flag="--chunk-size", metavar="N")
    capacity: int | None = option("integer", least=1, flag="--capacity", metavar="N")
    max_files: int = option("integer", 16, least=1)
    limits: Limits = field(default_factory=Limits)
    drain_s: float = option("number", 30.0, least=0, unit="seconds", flag="--drain-timeout", metavar="S")
    api_key: str | None = None  # key that clients must send; None: no key, or those of `keys_file`
    keys_file: Path | None = None  # file with keys, reloaded on SIGHUP; see `read_keys`
    cors_origins: tuple[str, ...] = option("texts", (), flag="--cors-origin", metavar="URL")
    tls_certificate: Path | None = option("path", flag="--tls-certificate", metavar="PEM")
    tls_key: Path | None = option("path", flag="--tls-key", metavar="PEM")
    forwarded_allow_ips: tuple[str, ...] = option("texts", (), flag="--forwarded-allow-ips", metavar="ADDRESS")
    log_format: Literal["text", "json"] = option("choice", "text", choices=("text", "json"), flag="--log-format")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, port in self.protocol_ports.items():
            options_of(ServerOptions)["port"].checked(f"the port of {name}", port)
        if self.workers > 1 and not hasattr(socket, "send_fds"):
            raise ValueError("several workers are not supported on Windows: they need sockets passed between processes")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both the certificate and its key")
        for file in filter(None, (self.tls_certificate, self.tls_key)):
            if not file.is_file():
                raise ValueError(f"{file}: no such file; TLS needs a PEM file")
        if self.socket_file and (self.host == "unix:" or self.protocol_ports or not hasattr(socket, "AF_UNIX")):
            raise ValueError("unix:PATH as --host needs a path, serves only HTTP and WebSocket, and not on Windows")
        with refused_as(ValueError, "--forwarded-allow-ips must be an address, a network or *"):
            for proxy in self.forwarded_allow_ips:
                proxy == "*" or ipaddress.ip_network(proxy)

    @property
    def socket_file(self) -> Path | None:
        """Path of the Unix socket to listen on; None: listen on an address."""
        return Path(self.host.removeprefix("unix:")) if self.host.startswith("unix:") else None

    @property
    def is_behind_proxy(self) -> bool:
        """Whether clients connect through a proxy. The proxy must then check the host name."""
        return bool(self.forwarded_allow_ips or self.socket_file)

    def is_proxy(self, address: Address) -> bool:
        """Return whether an address belongs to a proxy."""
        return any(proxy == "*" or address in ipaddress.ip_network(proxy) for proxy in self.forwarded_allow_ips)

    @property
    def has_keys(self) -> bool:
        """Whether clients need a key."""
        return self.api_key is not None or self.keys_file is not None

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine can reach the server."""
        return self.host in LOOPBACK or self.socket_file is not None


def check_tls(options: ServerOptions) -> None:
    """Raise ValueError if the TLS certificate and its key are invalid or do not match."""
    if options.tls_certificate is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.tls_certificate, options.tls_key)
        except (ssl.SSLError, OSError) as error:
            files = f"{options.tls_certificate}, {options.tls_key}"
            raise ValueError(f"{files}: must be a PEM certificate and its unencrypted key: {error}") from error
