"""Table of all protocols. Paths, ports, options and metrics are derived from it."""

from u2moe.runtime.server.protocols import live, realtime, rest, sherpa, vosk, wenet, wyoming

_FIRST = (live.PROTOCOL, rest.PROTOCOL, realtime.PROTOCOL, wenet.PROTOCOL)
PROTOCOLS = {each.name: each for each in (*_FIRST, sherpa.PROTOCOL, sherpa.OFFLINE, vosk.PROTOCOL, wyoming.PROTOCOL)}
"""Protocols by name."""
