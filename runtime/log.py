"""Logger of the package. Nothing is logged unless the program imports `logging`; this module does not import it."""

import sys

NAME = "u2moe"  # Name of the logger. It uses the levels DEBUG and INFO, which `logging` hides by default


def log_debug(message: str, *arguments: object) -> None:
    """Log a detail that explains a result. Arguments are those of `logging.debug`."""
    if logging := sys.modules.get("logging"):
        logging.getLogger(NAME).debug(message, *arguments)


def log_info(message: str, *arguments: object) -> None:
    """Log an event that is slow or happens only once. Arguments are those of `logging.info`."""
    if logging := sys.modules.get("logging"):
        logging.getLogger(NAME).info(message, *arguments)
