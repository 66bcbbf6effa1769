"""The library of u2moe-kernels, which these tests need."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def library():
    """The file of the installed library, or of the one that `benchmarks.endurance.sanitized_kernels` has built."""
    if built := os.environ.get("U2MOE_TEST_KERNELS"):
        return Path(built)
    package = pytest.importorskip(
        "u2moe_kernels", reason="u2moe-kernels is not installed: pip install ./runtime/kernels", exc_type=ImportError
    )
    return package.library_path()
