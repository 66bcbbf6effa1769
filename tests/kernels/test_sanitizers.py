"""Memory errors and races in the kernels: sanitizers, valgrind, and thousands of malformed layers. Each check builds
the library again. Every array then has separate memory, AMX is emulated, and all instruction sets of this processor
take part. Needs CMake, g++ and, for the last check, valgrind, which has no AVX-512."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.endurance, pytest.mark.timeout(7200),
    pytest.mark.skipif(not all(map(shutil.which, ("cmake", "g++"))), reason="needs cmake and g++"),
]  # fmt: skip

ROOT = Path(__file__).parents[2]
DIGESTS, STRESS, LIBRARY = "u2moe_kernels_digests", "u2moe_kernels_stress", "u2moe_kernels"
TESTS = ("operators", "streamed_layers", "positions")
SESSIONS = "sessions"
"""Tests of memory, threads and processes, which are the same on every instruction set."""
EMULATED = "amx"
"""Only its products are tested; everything else is as with AVX-512 VNNI."""
FORKING = "forks_while_threads"
"""Not run under the address sanitizer: the allocator of GCC 12's hung in 3 of 100 children of a program whose threads
only called `malloc`. The thread sanitizer and valgrind run them."""
THREADED = "threads or come_and_go or forked"
OPTIONS = {
    # Python and onnxruntime leak memory when they end. Use after return is not checked: its stack is less aligned than
    # the vectors that GCC 12 keeps on it, and programs crash.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1:hard_rss_limit_mb=6000",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # Python and onnxruntime are built without the sanitizer, so their memcpy calls are not checked.
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:die_after_fork=0",
    "U2MOE_TEST_EXAMPLES": "12",  # per test: they are many times slower under a sanitizer
}
PRELOADED = {"address,undefined": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
VALGRIND = ("valgrind", "--quiet", "--error-exitcode=9")


class Build:
    """Programs and library with a sanitizer, in a separate folder."""

    def __init__(self, kind, folder):
        self.folder = folder
        # GCC 12's thread sanitizer does not start with randomised addresses
        self.prefix = ["setarch", "--addr-no-randomize"] if kind == "thread" else []
        options = ["-DU2MOE_CHECKED=ON", "-DU2MOE_AMX_EMULATED=ON", f"-DU2MOE_SANITIZE={kind}"]
        flags = ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1 -g"]
        self._run("cmake", "-S", ROOT / "runtime" / "kernels", "-B", folder, *options, *flags)
        self._run("cmake", "--build", folder, "--target", DIGESTS, STRESS, LIBRARY)
        paths = [["g++", f"-print-file-name={name}"] for name in PRELOADED.get(kind, ())]
        self.preloaded = ":".join(self._run(*command).strip() for command in paths)

    def _run(self, *command, **own):
        how = {"cwd": ROOT, "env": {**os.environ, **OPTIONS, **own}, "errors": "replace"}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **how)
        assert done.returncode == 0, "\n".join([*done.stdout.splitlines(), *done.stderr.splitlines()][-60:])
        return done.stdout

    def program(self, name, *prefix):
        """Return the words that a program prints, line by line, on all instruction sets."""
        return [line.split() for line in self._run(*self.prefix, *prefix, self.folder / name).splitlines()]

    def tests(self, names, isa, *options):
        """Run tests of the operators on one instruction set."""
        files = [f"tests/kernels/test_{name}.py" for name in names]
        library = self.folder / f"lib{LIBRARY}.so"
        own = {"LD_PRELOAD": self.preloaded, "U2MOE_TEST_KERNELS": str(library), "U2MOE_KERNELS_ISA": isa}
        waiting = ["-o", "faulthandler_timeout=7500"]  # as `make endurance`: the usual limit of 15 minutes is too short
        pytest_run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *waiting, *files, *options]
        return self._run(*self.prefix, *pytest_run, **own)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Return a function from the kind of a sanitizer to a build, made once."""
    return functools.cache(lambda kind: Build(kind, tmp_path_factory.mktemp("build")))


def test_addresses_and_undefined_behaviour(build):
    """Run programs, then tests of operators on each instruction set, and of sessions on the best that is not
    emulated."""
    own = build("address,undefined")
    digests = dict(own.program(DIGESTS))
    assert len(set(digests.values())) == 1
    own.program(STRESS)
    for isa in digests:
        own.tests(TESTS[:1] if isa == EMULATED else TESTS, isa)
    own.tests([SESSIONS], next(isa for isa in digests if isa != EMULATED), "-k", f"not {FORKING}")


def test_malformed_layers(build):
    own = build("address,undefined")
    for isa in dict(own.program(DIGESTS)):
        own.tests(["damage"], isa, "-m", "endurance or not endurance")


def test_threads(build):
    """Run the program with threads, then tests through onnxruntime."""
    own = build("thread")
    own.program(STRESS)
    for isa in dict(own.program(DIGESTS)):
        own.tests([*TESTS, SESSIONS], isa, "-k", THREADED)


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
def test_values_that_nobody_has_written(build):
    own = build("")
    own.program(DIGESTS, *VALGRIND, "--leak-check=full", "--errors-for-leak-kinds=definite")
    own.program(STRESS, *VALGRIND)  # the program forks: memory held by a parent's threads is lost in its children
