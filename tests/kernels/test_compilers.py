"""The kernels from other compilers and for other processors: no warning, and the same digest everywhere."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parents[2] / "runtime" / "kernels"
DIGEST = "94c36cc1f1a89070"
"""Of the results of all layers in `cases.h`, on every instruction set and machine. What changes it changes results."""
PROGRAMS = [f"u2moe_kernels_{name}" for name in ("digests", "stress", "rates")]
BUILDS = {
    "gcc": ("g++", [], [], {"avx2", "scalar"}),
    "clang": ("clang++", [], [], {"avx2", "scalar"}),
    "gcc-aarch64": (
        "aarch64-linux-gnu-g++",
        ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static"],
        ["qemu-aarch64", "-cpu", "max"],
        {"neon-i8mm", "neon-dot", "neon", "scalar"},
    ),
}
"""By name: compiler, options of CMake, what runs the program, and instruction sets that must take part."""


@pytest.mark.parametrize("name", BUILDS)
def test_no_warning_and_the_same_results(name, tmp_path):
    compiler, options, prefix, isas = BUILDS[name]
    for tool in ("cmake", compiler, *prefix[:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    options = [f"-DCMAKE_CXX_COMPILER={compiler}", "-DU2MOE_WERROR=ON", "-DCMAKE_CXX_FLAGS=-O1 -Wpedantic", *options]
    run("cmake", "-S", SOURCE, "-B", tmp_path, "-DCMAKE_BUILD_TYPE=None", *options)
    run("cmake", "--build", tmp_path, "--target", *PROGRAMS, "u2moe_kernels")
    found = dict(line.split() for line in run(*prefix, tmp_path / "u2moe_kernels_digests").splitlines())
    assert set(found.values()) == {DIGEST}
    if prefix or "avx2" in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        assert found.keys() >= isas
    if not prefix:  # threads and forks take minutes in an emulator
        run(tmp_path / "u2moe_kernels_stress")
        assert "250 rows" in run(tmp_path / "u2moe_kernels_rates", "0")


def run(*command):
    environment = {**os.environ, "U2MOE_KERNELS_ISA": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
