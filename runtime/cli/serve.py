"""`u2moe serve`: parse, one call."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from u2moe.runtime.cli.options import (
    Options,
    Subparsers,
    add_session,
    add_words,
    chosen_bundle,
    session_settings,
    words_of,
)
from u2moe.runtime.installation import install_command
from u2moe.runtime.places import find_bundle

_KEY_VARIABLE = "U2MOE_API_KEY"


def add_serve(subparsers: Subparsers) -> None:
    """`u2moe serve [BUNDLE]`."""
    parser = subparsers.add_parser(
        "serve",
        help="run a server for existing speech recognition clients",
        description="Serve clients of OpenAI's REST and realtime APIs, WeNet, sherpa-onnx, vosk and Wyoming, our own "
        "WebSocket protocol (/stream), and a web page to try it (/). Needs "
        f"{install_command('cpu,server')}.",
    )
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="default: demo, the demo model")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=BUNDLE",
        help="a model that clients choose by this name, the first by default; instead of BUNDLE; may be repeated",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address, or unix:PATH for a Unix socket (default: 127.0.0.1, only this machine)",
    )
    parser.add_argument("--port", type=int, default=8000, help="port of HTTP and WebSocket (default: 8000)")
    parser.add_argument(
        "--api-key",
        type=Path,
        metavar="FILE",
        help=f"file with the key that clients must send (or ${_KEY_VARIABLE}), or with a name, a key and a number of "
        "streams on each line; read anew on SIGHUP",
    )
    add_words(parser)
    parser.add_argument(
        "--format-text", action="store_true", help="English: digits for numbers, small letters; clients may choose, too"
    )
    experts = parser.add_argument_group("for experts")
    _add_ports(experts)
    _add_limits(experts)
    parser.set_defaults(run=run_serve)


def _add_ports(parser: Options) -> None:
    parser.add_argument(
        "--protocol",
        action="append",
        default=[],
        metavar="NAME=PORT",
        help="serve a protocol on a separate port: wyoming (for Home Assistant, usually 10300), or wenet, sherpa, "
        "sherpa-offline or vosk at /, for clients without paths; may be repeated",
    )
    parser.add_argument(
        "--language",
        action="append",
        default=[],
        metavar="CODE",
        help="language of the model, for Home Assistant; may be repeated (default: zh and en, by the vocabulary)",
    )
    parser.add_argument(
        "--forwarded-allow-ips",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="address or network of a proxy whose X-Forwarded-For and X-Forwarded-Proto are believed; may be repeated",
    )
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="default: text")
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="origin whose pages may use it; may be repeated",
    )
    parser.add_argument("--tls-certificate", type=Path, metavar="PEM", help="certificate for HTTPS and WSS")
    parser.add_argument("--tls-key", type=Path, metavar="PEM", help="key of the certificate")


def _add_limits(parser: Options) -> None:
    parser.add_argument("--chunk-size", type=int, metavar="N", help="encoder frames per chunk (default: 16)")
    add_session(parser)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--capacity", type=int, metavar="N", help="live streams per worker (default: measured)")
    parser.add_argument("--max-upload", type=int, default=512, metavar="MB", help="size of a file (default: 512)")
    parser.add_argument(
        "--max-duration", type=float, default=14400, metavar="S", help="limit on audio in seconds (default: 14400)"
    )
    parser.add_argument(
        "--idle-timeout", type=float, default=60, metavar="S", help="seconds with hardly any audio (default: 60)"
    )
    parser.add_argument(
        "--drain-timeout", type=float, default=30, metavar="S", help="seconds to finish after SIGTERM (default: 30)"
    )


def run_serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    from u2moe.runtime.corpus.model_choice import ModelChoice
    from u2moe.runtime.options import DecodingOptions
    from u2moe.runtime.server.launch import launch
    from u2moe.runtime.server.options import Limits, ServerOptions

    options = ServerOptions(
        host=args.host,
        port=args.port,
        protocol_ports=_protocol_ports(args.protocol),
        languages=tuple(args.language),
        workers=args.workers,
        chunk_size=args.chunk_size,
        capacity=args.capacity,
        limits=Limits(upload_bytes=args.max_upload << 20, duration_s=args.max_duration, idle_s=args.idle_timeout),
        drain_s=args.drain_timeout,
        api_key=os.environ.get(_KEY_VARIABLE) if args.api_key is None else None,
        keys_file=args.api_key,
        forwarded_allow_ips=tuple(args.forwarded_allow_ips),
        logs_json=args.log_format == "json",
        cors_origins=tuple(args.cors_origin),
        tls_certificate=args.tls_certificate,
        tls_key=args.tls_key,
    )
    models = {}
    for name, bundle in _bundles(args).items():
        hotwords, language_model, text_format = words_of(args, bundle)
        models[name] = ModelChoice(
            directory=str(bundle),
            settings=session_settings(args),
            options=DecodingOptions(language_model=language_model, text_format=text_format),
            hotwords=hotwords,
        )
    return launch(options, models)


def _bundles(args: argparse.Namespace) -> dict[str, Path]:
    """The folder of each model."""
    if not args.model:
        bundle = chosen_bundle(args.bundle, "serve BUNDLE")
        return {bundle.name: bundle}
    if args.bundle is not None:
        raise ValueError("name models as BUNDLE or with --model, not both")
    return {name: find_bundle(bundle) for name, bundle in _named("--model", "NAME=BUNDLE", args.model).items()}


def _protocol_ports(values: list[str]) -> dict[str, int]:
    ports = _named("--protocol", "NAME=PORT", values)
    for name, port in ports.items():
        if not port.isdecimal():
            raise ValueError(f"--protocol must be NAME=PORT, got {name}={port}")
    return {name: int(port) for name, port in ports.items()}


def _named(option: str, form: str, values: list[str]) -> dict[str, str]:
    """The values of a repeated option, by name."""
    named: dict[str, str] = {}
    for text in values:
        name, _, value = text.partition("=")
        if not (name and value):
            raise ValueError(f"{option} must be {form}, got {text!r}")
        if name in named:
            raise ValueError(f"{option} must name each once, got {name} twice")
        named[name] = value
    return named
