"""The kernels with other compilers, for other processors and on every instruction set: no warnings, the same digest
everywhere, and the choice by the environment variable."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "runtime" / "kernels"
DIGEST = "de790d08efc5d6bc"
"""Digest of the results of all layers in `cases.h`, the same on every instruction set and machine. If it changes,
results change."""
PROGRAMS = [f"u2moe_kernels_{name}" for name in ("digests", "stress", "rates")]
WINDOWS = ["-DCMAKE_SYSTEM_NAME=Windows", "-DCMAKE_SYSTEM_PROCESSOR=AMD64", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
BUILDS = {
    "gcc": ("g++", [], [], {"avx2", "scalar"}),
    "clang": ("clang++", [], [], {"avx2", "scalar"}),
    "gcc-aarch64": ("aarch64-linux-gnu-g++",
        ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static"],
        ["qemu-aarch64", "-cpu", "max"], {"neon-i8mm", "neon-dot", "neon", "scalar"}),
    "mingw": ("x86_64-w64-mingw32-g++-posix", WINDOWS, ["wine"], {"avx2", "scalar"}),
}  # fmt: skip
"""Builds by name: compiler, CMake options, runner of the program, and instruction sets that must take part."""


@pytest.mark.endurance  # `make test` builds the wheel with warnings as errors
@pytest.mark.parametrize("name", BUILDS)
def test_no_warning_and_the_same_results(name, tmp_path):
    compiler, options, prefix, isas = BUILDS[name]
    for tool in ("cmake", compiler, *(tool for tool in prefix[:1] if tool != "wine" or "WINEPREFIX" in os.environ)):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    options = [f"-DCMAKE_CXX_COMPILER={compiler}", "-DU2MOE_WERROR=ON", "-DCMAKE_CXX_FLAGS=-O1 -Wpedantic", *options]
    printed("cmake", "-S", SOURCE, "-B", tmp_path, "-DCMAKE_BUILD_TYPE=None", *options)
    printed("cmake", "--build", tmp_path, "--target", *PROGRAMS, "u2moe_kernels")
    if prefix == ["wine"] and "WINEPREFIX" not in os.environ:
        return  # compiled but not run: wine needs a folder of 800 MB, which the caller must name
    found = dict(line.split() for line in printed(*prefix, next(tmp_path.glob(f"{PROGRAMS[0]}*"))).splitlines())
    assert set(found.values()) == {DIGEST}
    if "avx2" not in isas or "avx2" in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        assert found.keys() >= isas
    if not prefix:  # threads and forks take minutes in an emulator
        printed(tmp_path / "u2moe_kernels_stress")
        assert "250 rows" in printed(tmp_path / "u2moe_kernels_rates", "0")


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries may round twice")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_scalar_multiplications_and_additions_are_rounded_once(tmp_path):
    flags = ["-O2", "-std=c++17", "-ffp-contract=off", f"-I{SOURCE / 'source'}"]
    printed("g++", *flags, "-o", tmp_path / "fused", Path(__file__).with_name("fused.cpp"))
    assert printed(tmp_path / "fused") == "0\n"


def run(*command, isa=""):
    environment = {**os.environ, "U2MOE_KERNELS_ISA": isa, "U2MOE_TEST_EXAMPLES": "10", "WINEDEBUG": "-all"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def printed(*command, isa=""):
    done = run(*command, isa=isa)
    assert done.returncode == 0, f"{isa}: {done.stdout}{done.stderr}"
    return done.stdout


def description(isa=""):
    return run(sys.executable, "-c", "import u2moe_kernels; print(u2moe_kernels.description())", isa=isa)


def test_the_best_instruction_set_is_chosen_a_lower_one_can_be_forced_and_others_are_named(library):
    found = eval(description().stdout)
    isas = found["isas"]
    assert (found["isa"], isas[-1]) == (isas[0], "scalar")
    assert eval(description("scalar").stdout)["isa"] == "scalar"
    for isa in ("mmx", 'a"b\n\\'):
        told = f"U2MOE_KERNELS_ISA must be one of {', '.join(isas)} on this processor, got {isa}"
        assert description(isa).stderr.rstrip("\n").endswith(told)


@pytest.mark.endurance
def test_operators_compute_the_same_on_each(library):
    """Run all of `test_operators` on each instruction set except the best, with fewer random layers."""
    operators = Path(__file__).with_name("test_operators.py")
    for isa in eval(description().stdout)["isas"][1:]:
        printed(sys.executable, "-m", "pytest", "-q", "-x", operators, "-p", "no:cacheprovider", isa=isa)
