"""A bundle depends only on the checkpoint: the same bytes on every processor, equal to those of the demo."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from u2moe.quantize import RECIPES, quantize_bundle
from u2moe.runtime import Bundle
from u2moe.runtime.bundle_location import DEMO_FOLDER

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
CHECKPOINT = TESTS.parent / "examples" / "train_demo" / "checkpoint"
EMULATOR = shutil.which("qemu-x86_64")
WRITE = f"""
import sys, torch
from pathlib import Path
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "toys")!r}]
import conftest, test_reproducible_bundles
folder, num_threads = sys.argv[1:]
torch.set_num_threads(int(num_threads))
test_reproducible_bundles.write(conftest.write_bundle, Path(folder))
"""
QUANTIZE = """
import sys
from u2moe.quantize import RECIPES, quantize_bundle
quantize_bundle(*sys.argv[1:], RECIPES["int8"])
"""


def write(write_bundle, folder):
    """Write the demo checkpoint's float32 bundle, and its int8 bundle."""
    quantize_bundle(write_bundle(CHECKPOINT, folder / "fp32"), folder / "int8", RECIPES["int8"])


def digests(folder):
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run(*command, **environment):
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def here(export_quickly, tmp_path_factory):
    """The folder of both, as made on this processor."""
    folder = tmp_path_factory.mktemp("here")
    write(export_quickly, folder)
    return folder


@pytest.mark.parametrize(("num_threads", "environment"), [
    pytest.param(1, {"ATEN_CPU_CAPABILITY": "default"}, id="plain code", marks=pytest.mark.endurance),
    pytest.param(2, {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, id="AVX2 and two threads",
                 marks=pytest.mark.endurance),
])  # fmt: skip
def test_bundles_are_equal_to_the_byte(here, tmp_path, num_threads, environment):
    run(sys.executable, "-c", WRITE, tmp_path, str(num_threads), **environment)
    assert digests(tmp_path) == digests(here)


def test_the_demo_is_what_its_checkpoint_gives(here):
    again, demo = Bundle.open(here / "int8"), Bundle.open(DEMO_FOLDER)
    assert again.manifest.model == demo.manifest.model
    assert again.tokens == demo.tokens
    features = np.random.default_rng(0).normal(10, 3, (300, 80)).astype(np.float32)
    np.testing.assert_array_equal(again.load().encode(features), demo.load().encode(features))
    for graph in demo.manifest.model.graphs():
        written, shipped = (ir.load(bundle.path / graph.file) for bundle in (again, demo))
        # native kernels replace these functions: an older form yields the same numbers with a smaller gain
        assert [node.op_type for node in written.graph] == [node.op_type for node in shipped.graph]
        found, expected = written.graph.initializers, shipped.graph.initializers
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name].const_value.numpy(), value.const_value.numpy(), err_msg=name)


@pytest.mark.endurance
@pytest.mark.skipif(EMULATOR is None, reason="needs Debian's qemu-user")
def test_an_emulated_processor_quantizes_to_the_same_bytes(here, tmp_path):
    """numpy and onnxruntime also use other code there; importing torch in the emulator takes most of the time."""
    run(EMULATOR, "-cpu", "Haswell-noTSX", sys.executable, "-c", QUANTIZE, here / "fp32", tmp_path / "int8")
    assert digests(tmp_path / "int8") == digests(here / "int8")
