"""Location and description of the library of native operators. onnxruntime loads the library."""

import ctypes
import functools
import json
import sys
from pathlib import Path
from typing import Any

from u2moe_kernels._version import __version__

__all__ = ["__version__", "description", "library_path"]

_NAMES = {"win32": "u2moe_kernels.dll"}


def library_path() -> Path:
    """Return the path of the library, for `SessionOptions.register_custom_ops_library`."""
    return Path(__file__).parent / _NAMES.get(sys.platform, "libu2moe_kernels.so")


@functools.cache
def _described() -> str:
    """Return the JSON with which the library describes itself."""
    describe = ctypes.CDLL(str(library_path())).u2moe_kernels_describe
    describe.argtypes, describe.restype = (ctypes.c_char_p, ctypes.c_size_t), ctypes.c_size_t
    text = ctypes.create_string_buffer(describe(None, 0))
    describe(text, len(text))
    return text.value.decode(errors="replace")


def description() -> dict[str, Any]:
    """Return the library's features on this machine.

    Returns:
        A dictionary with these entries:

        - isa: instruction set in use.
        - isas: all supported instruction sets of this processor, best first.
        - domain, operators: domain and names of the operators. Numbered copies of an operator are omitted.
        - contract: version of the operators' inputs, attributes and results.
        - layout: version of the layout of packed weights.
        - api: required version of onnxruntime's C API.

    Raises:
        ValueError: U2MOE_KERNELS_ISA names an instruction set that is unknown or that this processor lacks.
    """
    found: dict[str, Any] = json.loads(_described())
    if "error" in found:
        raise ValueError(found["error"])
    return found
