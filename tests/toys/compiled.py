"""Compiles the C++ library and programs that use it."""

import fcntl
import importlib
import json
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
QUICK = ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=10", ONNXRUNTIME]
"""Settings of a build that need not be fast."""
TRANSCRIBE = "example/u2moe_transcribe"
VALGRIND = ["valgrind", "-q", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite,possible"]
ADDRESSES, THREADS = "address,undefined", "thread"
"""Sanitizers, which end a program after an invalid access, undefined behaviour or a leak; or after a data race."""
NEEDED = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, ("c++", "cmake"))),
        reason="needs a C++ compiler and cmake: apt-get install cmake g++"),
    pytest.mark.skipif(not any((ONNXRUNTIME_FOLDER / "capi").glob("libonnxruntime.*")),
        reason="needs an onnxruntime whose package has the library, as newer ones have"),
]  # fmt: skip
"""Marks of tests that compile."""
# Use after return is not checked, as in kernels/test_sanitizers.py: its stack is less aligned than vectors need.
_OPTIONS = {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}


def cmake(*arguments):
    """Run cmake, which must neither fail nor warn."""
    done = subprocess.run(["cmake", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning:" not in done.stderr, done.stderr


def build(folder, target, *settings, source):
    """Compile a target in a folder, and return its path."""
    cmake("-B", folder, *settings, source)
    cmake("--build", folder, "--target", target)
    return folder / target


def built_kernels():
    """Return Python's native kernels; compiling them again would take as long as everything else."""
    try:
        return importlib.import_module("u2moe_kernels").library_path()
    except ModuleNotFoundError:
        return "OFF"


def sanitized(kind):
    """Return parameters of a fixture: no sanitizer and, in endurance tests, one of this kind."""
    return ["", pytest.param(kind, marks=pytest.mark.endurance)]


class Library:
    """A shared library, installed in `prefix`, and the programs of tests/cpp linked to it, in `programs`. They are
    compiled once for all workers and tests with the same sanitizers. Files of such tests have names far apart in the
    alphabet, so that workers do not wait for the compiler at the same time."""

    def __init__(self, factory, sanitizers=""):
        root = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
        self.sanitizers, self.folder = sanitizers, root / f"cpp-{sanitizers[:6]}"  # linker options end at a comma
        self.prefix, self.programs = self.folder / "prefix", self.folder / "programs"
        # the thread sanitizer needs addresses that the kernel may use otherwise
        self.wrapper = ["setarch", "-R"] if sanitizers == THREADS else []
        self.flags = f"-fsanitize={sanitizers} -fno-sanitize-recover=all -g1" if sanitizers else ""
        kernels = "ON" if sanitizers == ADDRESSES else built_kernels()
        self.settings = [f"-DU2MOE_KERNELS={kernels}", SIGNATURES]
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (self.folder / "done").exists():
                cases = f"-DCMAKE_PROJECT_u2moe_INCLUDE={CHECKS / 'cases.cmake'}"
                self.install(self.folder, "-DBUILD_SHARED_LIBS=ON", "-DCMAKE_INSTALL_LIBDIR=lib", cases)
                found = [f"-DCMAKE_PREFIX_PATH={self.prefix}", f"-DBUILD={self.folder / 'library'}"]
                linked = f"-DKERNELS={'' if kernels in ('ON', 'OFF') else kernels}"
                own = [SIGNATURES, linked, f"-DCMAKE_CXX_FLAGS={self.flags}", f"-DCMAKE_C_FLAGS={self.flags}"]
                build(self.programs, "all", *QUICK, *own, *found, source=CHECKS)
                (self.folder / "done").touch()

    def install(self, folder, *settings, objects=None):
        """Compile the library in a folder, and install it beside it in `prefix`. Objects of another folder with the
        same flags are used: those of a static and a shared library are the same."""
        flags = f"-DCMAKE_CXX_FLAGS=-O1 {self.flags}".strip()
        cmake("-B", folder / "library", *QUICK, *self.settings, flags, *settings, SOURCE)
        for file in (objects / "library" / "CMakeFiles" / "u2moe.dir").rglob("*.o") if objects else ():
            target = folder / "library" / file.relative_to(objects / "library")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)  # newer than its sources, so make does not compile it
        cmake("--build", folder / "library", "--target", "u2moe")
        cmake("--install", folder / "library", "--prefix", folder / "prefix")

    def run(self, program, *arguments, wrapper=(), **how):
        command = [*self.wrapper, *wrapper, *map(str, (self.programs / program, *arguments))]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": {**os.environ, **_OPTIONS}, **how}
        return subprocess.run(command, check=False, timeout=300, **how)

    def printed(self, *command, **how):
        """Return what a program prints, which must not fail."""
        done = self.run(*command, **how)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout.decode()

    def check(self, *arguments):
        """Return the output of tests/cpp/checks.cpp with these arguments."""
        return self.printed("checks", *arguments)

    def segments(self, *arguments, program=TRANSCRIBE, **how):
        """Return the segments that the program prints as JSON."""
        return [json.loads(line) for line in self.printed(program, "--json", *arguments, **how).splitlines()]

    def problem(self, *arguments, **how):
        """Return the last line of an error message of the program."""
        done = self.run(TRANSCRIBE, *arguments, **how)
        assert done.returncode in (1, 2), done.stderr[-2000:]
        return [line for line in done.stderr.decode().splitlines() if line.startswith("u2moe_transcribe: ")][-1]
