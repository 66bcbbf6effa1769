"""Starts a server from options: loads the model, opens the ports, and reports where it listens."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version

from u2moe.runtime.corpus.model_choice import ModelChoice
from u2moe.runtime.errors import U2moeError
from u2moe.runtime.server.event_loop import run_in_loop
from u2moe.runtime.server.keys import Keys
from u2moe.runtime.server.listeners import HTTP, Listener, open_listeners
from u2moe.runtime.server.log import LOGGER, log_to_stderr, notify
from u2moe.runtime.server.metrics import Metrics
from u2moe.runtime.server.options import ServerOptions, check_tls
from u2moe.runtime.server.protocols.table import PROTOCOLS
from u2moe.runtime.server.server import Server
from u2moe.runtime.server.service import Service
from u2moe.runtime.server.signals import ended_by_sigterm, handle_signals
from u2moe.runtime.server.workers import WorkerPlace, run_workers

_AFTER_STOP_S = 2.0
"""Seconds for files to notice that nobody waits for them."""


def launch(options: ServerOptions, models: Mapping[str, ModelChoice]) -> int:
    """Serve until told to stop; returns the exit code. Logs to stderr.

    Args:
        options: options of the server.
        models: the models that each worker loads, by the names that they have for clients, the default first; files are
            decoded with their options.

    Raises:
        OSError: a port cannot be opened.
        BundleError: not a bundle, or a damaged one.
    """
    log_to_stderr(is_json=options.logs_json)
    check_tls(options)
    Keys(options)  # fails here rather than with the first client
    listeners = open_listeners(options)
    code = 0
    try:
        with ended_by_sigterm():
            _log_addresses(options, listeners)
            if options.workers > 1:
                code = run_workers(options.workers, partial(_work, options, models, listeners))
            else:
                run_in_loop(_serve(options, models, listeners))
    finally:
        for listener in listeners:
            listener.socket.close()
        if options.socket_file is not None:
            options.socket_file.unlink(missing_ok=True)
    LOGGER.info("stopped")
    return code


async def _serve(
    options: ServerOptions,
    models: Mapping[str, ModelChoice],
    listeners: Sequence[Listener],
    place: WorkerPlace | None = None,
) -> None:
    """Serve in this process, as a worker where it has a place.

    All objects so far are exempted from garbage collection. What connections leave behind is then collected sooner: a
    full collection waits until the number of new objects is a quarter of those that survived the last.
    """
    recognizers = {}
    for name, model in models.items():
        recognizer = recognizers[name] = await asyncio.to_thread(model.load)
        path, kernels = recognizer.bundle.path, recognizer.model.kernels
        LOGGER.info("u2moe %s: loaded %s from %s, kernels: %s", version("u2moe"), name, path, kernels)
    gc.collect()
    gc.freeze()
    rows = () if place is None else (place.rows, place.number)
    service = Service(recognizers, options, Metrics(tuple(PROTOCOLS), *rows))

    loop = asyncio.get_running_loop()

    def ready() -> None:
        handle_signals(*(partial(loop.call_soon_threadsafe, call) for call in (server.stop, server.reload)))
        if place is None:
            LOGGER.info("ready: %d live streams at a time", service.admission.num_places)
            notify("READY=1")

    server = Server(service, ready, 0 if place is None else place.number)
    await server.run_on(listeners)
    _end_without_waiting(service)


def _end_without_waiting(service: Service) -> None:
    """End the process if a file does not let go: the interpreter would wait for its thread."""
    if not service.files.join(_AFTER_STOP_S):
        LOGGER.info("stopped")
        sys.stderr.flush()
        os._exit(0)


def _work(
    options: ServerOptions, models: Mapping[str, ModelChoice], listeners: Sequence[Listener], place: WorkerPlace
) -> None:
    """Serve in a separate process, beside others."""
    log_to_stderr(place.number, is_json=options.logs_json)
    try:
        with ended_by_sigterm():
            run_in_loop(_serve(options, models, listeners, place))
    except (U2moeError, ValueError, OSError) as error:
        sys.exit(f"u2moe: error: {error}")


def _log_addresses(options: ServerOptions, listeners: Sequence[Listener]) -> None:
    """Log where the server listens, and a warning if anyone on the network may use it."""
    host, tls = f"[{options.host}]" if ":" in options.host else options.host, "s" if options.tls_certificate else ""
    for listener in listeners:
        name = listener.speaks
        if options.socket_file is not None:
            LOGGER.info("listening at %s", options.host)
        elif name == HTTP:
            LOGGER.info("listening at http%s://%s:%d/", tls, host, listener.port)
        else:
            kind = f"ws{tls}" if PROTOCOLS[name].run_tcp is None else "tcp"
            LOGGER.info("listening at %s://%s:%d/ (%s)", kind, host, listener.port, name)
    if not options.is_local and not options.has_keys:
        LOGGER.warning("anyone who reaches %s may use this server: it has no API key", options.host)
