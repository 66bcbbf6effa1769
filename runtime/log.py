"""The package's logger, which costs nothing where a program does not use `logging`: nobody could see a message then."""

from __future__ import annotations

import sys

NAME = "u2moe"
"""Name of the logger. Messages are of level DEBUG and INFO, which `logging` does not show unless it is asked to."""


def log_debug(message: str, *arguments: object) -> None:
    """Log what explains a result, in the style of `logging.debug`."""
    if logging := sys.modules.get("logging"):
        logging.getLogger(NAME).debug(message, *arguments)


def log_info(message: str, *arguments: object) -> None:
    """Log what takes long or happens once, in the style of `logging.info`."""
    if logging := sys.modules.get("logging"):
        logging.getLogger(NAME).info(message, *arguments)
