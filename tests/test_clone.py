"""The size of a clone: large files need a reason."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LARGEST_TREE, LARGE = 45e6, 1e6
"""Maximum bytes of all files, and the size from which a file must be listed here."""
LISTED = {
    "examples/train_demo/checkpoint/final.pt.xz": "the demo model in WeNet's form, from which its bundle is made",
    "runtime/demo/encoder.onnx": "the demo model",
    "runtime/demo/decoder.onnx": "the demo model",
    "runtime/demo/language.lm": "its language model",
}


def test_a_clone_is_small_and_large_files_have_reasons():
    """Training states and results of runs belong elsewhere, because the history keeps every version forever."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a clone")
    sizes = {name: (ROOT / name).stat().st_size for name in done.stdout.split("\0") if name and (ROOT / name).is_file()}
    assert {name for name, size in sizes.items() if size > LARGE} == set(LISTED)
    assert sum(sizes.values()) <= LARGEST_TREE
    assert "git clone --depth 1" in (ROOT / "README.md").read_text(encoding="utf-8")
