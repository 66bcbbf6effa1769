"""Where the library of native operators is, and what it is; onnxruntime loads it."""

from __future__ import annotations

import ctypes
import functools
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["description", "library_path"]

__version__ = version("u2moe-kernels")

_NAMES = {"win32": "u2moe_kernels.dll"}


def library_path() -> Path:
    """The library, for `SessionOptions.register_custom_ops_library`."""
    return Path(__file__).parent / _NAMES.get(sys.platform, "libu2moe_kernels.so")


@functools.cache
def _described() -> str:
    """The library's description of itself, as JSON."""
    describe = ctypes.CDLL(str(library_path())).u2moe_kernels_describe
    describe.argtypes, describe.restype = (ctypes.c_char_p, ctypes.c_size_t), ctypes.c_size_t
    text = ctypes.create_string_buffer(describe(None, 0))
    describe(text, len(text))
    return text.value.decode(errors="replace")


def description() -> dict[str, Any]:
    """The library's features on this machine.

    Returns:
        isa: the instruction set that it uses; isas: all that this processor has, best first; domain and operators: what
        it registers, without the numbered twins; contract: the version of their inputs, attributes and results; layout:
        that of packed weights; api: that of onnxruntime's C API that it asks for.

    Raises:
        ValueError: U2MOE_KERNELS_ISA names an instruction set that is unknown or that this processor lacks.
    """
    found: dict[str, Any] = json.loads(_described())
    if "error" in found:
        raise ValueError(found["error"])
    return found
