"""Client protocols, one per file, and a table of all protocols. Paths, ports, options and metrics derive from it."""

from u2moe.runtime.server.connection import Protocol
from u2moe.runtime.server.protocols import live, realtime, rest, sherpa, vosk, wenet, wyoming

_MODULES = (live, rest, realtime, wenet, sherpa, vosk, wyoming)
PROTOCOLS = {each.name: each for module in _MODULES for each in vars(module).values() if isinstance(each, Protocol)}
