"""The library of u2moe-kernels, which these tests need."""

import ctypes
import json
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def library():
    """Return the installed library, or the one that `test_sanitizers.py` has built."""
    if built := os.environ.get("U2MOE_TEST_KERNELS"):
        return Path(built)
    package = pytest.importorskip(
        "u2moe_kernels", reason="u2moe-kernels is not installed: pip install ./runtime/kernels", exc_type=ImportError
    )
    return package.library_path()


@pytest.fixture(scope="session")
def operators(library):
    """Return the names that the library registers on this processor. NEON has no convolutions."""
    describe = ctypes.CDLL(str(library)).u2moe_kernels_describe
    describe.restype = ctypes.c_size_t
    text = ctypes.create_string_buffer(describe(None, ctypes.c_size_t(0)))
    describe(text, ctypes.c_size_t(len(text)))
    return set(json.loads(text.value)["operators"])
