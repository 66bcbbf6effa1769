"""Table of all protocols. Paths, ports, options and metrics are derived from it."""

from __future__ import annotations

from u2moe.runtime.server.protocols import live, realtime, rest, sherpa, sherpa_offline, vosk, wenet, wyoming

PROTOCOLS = {
    module.PROTOCOL.name: module.PROTOCOL
    for module in (live, rest, realtime, wenet, sherpa, sherpa_offline, vosk, wyoming)
}
"""Protocols by name."""
