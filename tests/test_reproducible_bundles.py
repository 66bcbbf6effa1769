"""What a bundle holds depends on the checkpoint alone: the same bytes whatever computes them."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from u2moe.quantize import RECIPES, quantize_bundle

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
CHECKPOINT = TESTS.parent / "examples" / "train_demo" / "checkpoint"
EMULATOR = shutil.which("qemu-x86_64")
WRITE = f"""
import json, sys, torch
from pathlib import Path
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "toys")!r}]
import conftest, test_reproducible_bundles
folder, num_threads = sys.argv[1:]
torch.set_num_threads(int(num_threads))
print(json.dumps(test_reproducible_bundles.digests(conftest.write_bundle, Path(folder))))
"""


def digests(write_bundle, folder):
    """Of all files of the demo checkpoint's float32 bundle, and of its int8 bundle."""
    float32 = write_bundle(CHECKPOINT, folder / "fp32")
    quantize_bundle(float32, folder / "int8", RECIPES["int8"])
    files = sorted(file for name in ("fp32", "int8") for file in (folder / name).iterdir())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def expected(export_quickly, tmp_path_factory):
    return digests(export_quickly, tmp_path_factory.mktemp("here"))


@pytest.mark.parametrize(
    ("environment", "num_threads"),
    [
        ({"ATEN_CPU_CAPABILITY": "default"}, 1),
        ({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, 2),
        pytest.param(None, 1, marks=pytest.mark.skipif(EMULATOR is None, reason="needs Debian's qemu-user")),
    ],
    ids=["plain code", "AVX2 and two threads", "emulated Haswell"],
)
def test_bundles_are_equal_to_the_byte(expected, tmp_path, environment, num_threads):
    emulated = [EMULATOR, "-cpu", "Haswell-noTSX"] if environment is None else []
    command = [*emulated, sys.executable, "-c", WRITE, str(tmp_path), str(num_threads)]
    environment = {**os.environ, **(environment or {})}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1]) == expected
