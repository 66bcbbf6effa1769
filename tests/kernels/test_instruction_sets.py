"""Every instruction set of this processor, forced by the environment variable, in separate processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PRINT = "import u2moe_kernels; print(u2moe_kernels.description()[{!r}])"
OPERATORS = str(Path(__file__).with_name("test_operators.py"))


def run(*arguments, isa=""):
    environment = {**os.environ, "U2MOE_KERNELS_ISA": isa, "U2MOE_TEST_EXAMPLES": "10"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_best_is_chosen_a_lower_one_can_be_forced_and_others_are_named(library):
    isas = eval(run("-c", PRINT.format("isas")).stdout)
    assert isas[-1] == "scalar"
    assert run("-c", PRINT.format("isa")).stdout.strip() == isas[0]
    assert run("-c", PRINT.format("isa"), isa="scalar").stdout.strip() == "scalar"
    found = run("-c", PRINT.format("isa"), isa="mmx")
    assert f"U2MOE_KERNELS_ISA must be one of {', '.join(isas)} on this processor, got mmx" in found.stderr
    found = run("-c", PRINT.format("isa"), isa='a"b\n\\')
    assert found.stderr.rstrip("\n").endswith('on this processor, got a"b\n\\')


@pytest.mark.endurance
def test_operators_compute_the_same_on_each(library):
    """Run all of `test_operators` on each instruction set except the best, with fewer random layers. `test_compilers`
    also checks that all sets return the same bits."""
    for isa in eval(run("-c", PRINT.format("isas")).stdout)[1:]:
        found = run("-m", "pytest", "-q", "-x", OPERATORS, "-p", "no:cacheprovider", isa=isa)
        assert found.returncode == 0, f"{isa}: {found.stdout}"
