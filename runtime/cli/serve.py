"""`u2moe serve`: run the server."""

import argparse
import os
from pathlib import Path

from u2moe.runtime.bundle_location import find_bundle
from u2moe.runtime.cli.options import add_declared, add_session, add_words, chosen_bundle, declared_in, model_choice
from u2moe.runtime.declarations import options_of
from u2moe.runtime.installation import install_command
from u2moe.runtime.options import BUNDLED, BundledOptions, DecodingOptions
from u2moe.runtime.server.options import Limits, ServerOptions

_KEY_VARIABLE = "U2MOE_API_KEY"
_BASIC = {"host", "port"}


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Add `u2moe serve [BUNDLE]`."""
    parser.description = (
        "Serve clients of OpenAI's REST and realtime APIs, WeNet, sherpa-onnx, vosk and Wyoming, and of "
        "our own WebSocket protocol (/stream). Also serve a web page (/) for trying the server. To install: "
        f"{install_command('cpu,server')}."
    )
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="bundle to serve (default: demo, the demo model)")
    about = (
        "instead of BUNDLE: a bundle and the name by which clients select it; may be repeated (the first is the "
        "default)"
    )
    parser.add_argument("--model", action="append", default=[], metavar="NAME=BUNDLE", help=about)
    about = (
        "file with the key that clients must send, or with a line per key: a name, the key and optionally a "
        f"maximum number of streams; reloaded on SIGHUP (default: the key in ${_KEY_VARIABLE})"
    )
    parser.add_argument("--api-key", type=Path, metavar="FILE", help=about)
    add_declared(parser, ServerOptions, _BASIC)
    add_words(parser)
    experts = parser.add_argument_group("for experts")
    about = (
        "serve a protocol on a separate port: wyoming (for Home Assistant, usually port 10300), or wenet, sherpa, "
        "sherpa-offline or vosk at path / (for clients that cannot use another path); may be repeated"
    )
    experts.add_argument("--protocol", action="append", default=[], metavar="NAME=PORT", help=about)
    add_declared(experts, ServerOptions, options_of(ServerOptions).keys() - _BASIC)
    experts.add_argument("--max-upload", type=int, default=512, metavar="MB", help="largest upload (default: 512)")
    add_declared(experts, Limits)
    add_declared(experts, DecodingOptions, BUNDLED)
    add_session(experts)
    parser.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    from u2moe.runtime.server.launch import launch
    from u2moe.runtime.server.log import log_to_stderr

    ports = _named("--protocol", "NAME=PORT", args.protocol)
    for name, port in ports.items():
        if not port.isdecimal():
            raise ValueError(f"--protocol must be NAME=PORT, got {name}={port}")
    options = ServerOptions(
        **declared_in(args, ServerOptions),
        protocol_ports={name: int(port) for name, port in ports.items()},
        limits=Limits(upload_bytes=args.max_upload << 20, **declared_in(args, Limits)),
        api_key=os.environ.get(_KEY_VARIABLE) if args.api_key is None else None,
        keys_file=args.api_key,
    )
    log_to_stderr(is_json=options.log_format == "json")
    if args.model and args.bundle is not None:
        raise ValueError("name models as BUNDLE or with --model, not both")
    bundles = {name: find_bundle(bundle) for name, bundle in _named("--model", "NAME=BUNDLE", args.model).items()}
    if not bundles:
        bundle = chosen_bundle(args.bundle, "serve BUNDLE")
        bundles = {bundle.name: bundle}
    return launch(options, {name: model_choice(args, bundle, BundledOptions) for name, bundle in bundles.items()})


def _named(option: str, form: str, values: list[str]) -> dict[str, str]:
    """Return the values of a repeated NAME=VALUE option, by name."""
    named: dict[str, str] = {}
    for text in values:
        name, _, value = text.partition("=")
        if not (name and value):
            raise ValueError(f"{option} must be {form}, got {text!r}")
        if name in named:
            raise ValueError(f"{option}: found {name} twice, expected different names")
        named[name] = value
    return named
