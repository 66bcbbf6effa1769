"""Do the native kernels touch what they must not? Their tests, with address and undefined-behaviour sanitizers.

    python -m u2moe.benchmarks.endurance.sanitized_kernels BUILD [--examples 10000]

Run in a clone, with g++ and CMake. The library is built in the folder BUILD, which takes minutes; then the program that
compares instruction sets and the tests of the operators run with it, among them `--examples` damaged nodes. The exit
code is 0 if no sanitizer found anything and all tests passed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from u2moe.benchmarks.results.files import repository
from u2moe.benchmarks.script import report, run_script, script_parser

TARGETS = ("u2moe_kernels_digests", "u2moe_kernels")
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python itself leaks
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def build(folder: Path) -> Path:
    """Build the library and the program with sanitizers; returns the library."""
    source = repository() / "runtime" / "kernels"
    options = ["-DU2MOE_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1"]
    subprocess.run(["cmake", "-S", source, "-B", folder, *options], check=True, stdout=subprocess.DEVNULL)  # noqa: S603, S607
    subprocess.run(["cmake", "--build", folder, "--target", *TARGETS], check=True)  # noqa: S603, S607
    return folder / "libu2moe_kernels.so"


def environment(library: Path) -> Mapping[str, str]:
    """The environment in which Python can load a library with sanitizers, and in which tests use it."""
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603, S607
        for name in ("libasan.so", "libubsan.so")
    ]
    return {**os.environ, **OPTIONS, "LD_PRELOAD": ":".join(found), "U2MOE_TEST_KERNELS": str(library)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = script_parser("endurance.sanitized_kernels", __doc__)
    parser.add_argument("build", type=Path, help="folder for the build, created if missing")
    parser.add_argument("--examples", type=int, default=10_000, help="number of damaged nodes (default: 10,000)")
    options = parser.parse_args(arguments)
    library = build(options.build.resolve())
    report("digests")
    subprocess.run([library.with_name(TARGETS[0])], check=True)  # noqa: S603
    report("tests")
    own = {**environment(library), "U2MOE_TEST_EXAMPLES": str(options.examples)}
    files = [f"tests/kernels/test_{name}.py" for name in ("operators", "damage")]
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    return subprocess.run([sys.executable, *tests], cwd=repository(), env=own, check=False).returncode  # noqa: S603


if __name__ == "__main__":
    run_script(main)
