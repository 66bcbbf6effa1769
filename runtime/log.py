"""Logger of the package. Nothing is logged unless the program imports `logging`; this module does not import it."""

import sys
from typing import Literal

NAME = "u2moe"  # Name of the logger. It uses the levels DEBUG and INFO, which `logging` hides by default


def log(level: Literal["debug", "info"], message: str, *arguments: object) -> None:
    """Log a detail that explains a result ("debug"), or an event that is slow or happens only once ("info")."""
    if logging := sys.modules.get("logging"):
        getattr(logging.getLogger(NAME), level)(message, *arguments)
