"""Table of all protocols. Paths, ports, options and metrics are derived from it."""

from u2moe.runtime.server.protocols import live, realtime, rest, sherpa, vosk, wenet, wyoming

PROTOCOLS = {each.name: each for each in (
    live.PROTOCOL, rest.PROTOCOL, realtime.PROTOCOL, wenet.PROTOCOL, sherpa.PROTOCOL, sherpa.OFFLINE, vosk.PROTOCOL,
    wyoming.PROTOCOL,
)}  # fmt: skip
"""Protocols by name."""
