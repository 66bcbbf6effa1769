"""The library of u2moe-kernels, which these tests need."""

import pytest


@pytest.fixture(scope="session")
def library():
    """The file of the installed library."""
    package = pytest.importorskip(
        "u2moe_kernels", reason="u2moe-kernels is not installed: pip install ./runtime/kernels", exc_type=ImportError
    )
    return package.library_path()
