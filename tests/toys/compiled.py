"""Compiles the C++ library and programs that use it."""

import fcntl
import hashlib
import importlib
import os
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "runtime" / "cpp"
CHECKS = ROOT / "tests" / "cpp"
EXAMPLES = ROOT / "examples" / "c"
ONNXRUNTIME_FOLDER = Path(onnxruntime.__file__).parent
ONNXRUNTIME = f"-DONNXRUNTIME_ROOT={ONNXRUNTIME_FOLDER}"
HAS_OPENSSL = Path("/usr/include/openssl/evp.h").is_file()
SIGNATURES = f"-DU2MOE_SIGNATURES={'ON' if HAS_OPENSSL else 'OFF'}"
QUICK = ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=10"]
"""Settings of a build that need not be fast."""
NEEDED = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, ("c++", "cmake"))),
        reason="needs a C++ compiler and cmake: apt-get install cmake g++"),
    pytest.mark.skipif(not any((ONNXRUNTIME_FOLDER / "capi").glob("libonnxruntime.*")),
        reason="needs an onnxruntime whose package has the library, as newer ones have"),
]  # fmt: skip
"""Marks of tests that compile."""


def cmake(*arguments):
    """Run cmake, which must neither fail nor warn."""
    done = subprocess.run(["cmake", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning:" not in done.stderr, done.stderr


def built_kernels():
    """Return Python's native kernels; compiling them again would take as long as everything else."""
    try:
        return importlib.import_module("u2moe_kernels").library_path()
    except ModuleNotFoundError:
        return "OFF"


def shared_library(factory, *settings, flags):
    """Return the folder of a shared library, compiled once for all workers and tests with these settings."""
    root = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder = root / hashlib.sha256(repr([settings, flags]).encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "prefix").exists():
            cases = f"-DCMAKE_PROJECT_u2moe_INCLUDE={CHECKS / 'cases.cmake'}"
            installed_library(folder, "-DBUILD_SHARED_LIBS=ON", cases, *settings, flags=flags)
    return folder


def installed_library(folder, *settings, flags, compiled=None):
    """Compile the library in a folder, install it beside it in `prefix`, and return that. If `compiled` is the folder
    of a library with the same flags, its objects are used: those of a static and a shared library are the same."""
    common = [*QUICK, ONNXRUNTIME, "-DCMAKE_INSTALL_LIBDIR=lib", f"-DCMAKE_CXX_FLAGS={flags}"]
    cmake("-B", folder / "library", *common, *settings, SOURCE)
    for file in (compiled / "library" / "CMakeFiles" / "u2moe.dir").rglob("*.o") if compiled else ():
        target = folder / "library" / file.relative_to(compiled / "library")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)  # newer than its sources, so make does not compile it
    cmake("--build", folder / "library", "--target", "u2moe")
    cmake("--install", folder / "library", "--prefix", folder / "prefix")
    return folder / "prefix"
