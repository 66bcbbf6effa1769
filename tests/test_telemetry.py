"""onnxruntime's telemetry is disabled before onnxruntime is imported."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
FORKED = """
import os, signal, sys
import u2moe.runtime

if not (child := os.fork()):
    signal.alarm(60)  # ends it if it hangs
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run(home, *command, folder=None, **environment):
    """Return the output of a program with the home folder `home`, without the variable set for the tests."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    settings = {"env": {**inherited, "HOME": str(home), "USERPROFILE": str(home), **environment}, "cwd": folder}
    return subprocess.run(command, **settings, capture_output=True, text=True, check=True, timeout=120).stdout


def test_nothing_is_written_at_home_and_the_variable_is_set_by_the_package_alone(tmp_path):
    run(tmp_path, sys.executable, "-c", "from u2moe import Recognizer; Recognizer.from_pretrained().warm_up()")
    assert list(tmp_path.iterdir()) == []
    code = "import os, u2moe; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(tmp_path, sys.executable, "-c", code) == "1\n"
    assert run(tmp_path, sys.executable, "-c", code, ORT_DISABLE_TELEMETRY="0") == "0\n"
    # Only the top-level package sets it, because every import executes it. Other places may be too late
    files = (file for name in ("runtime", "export", "quantize", "benchmarks") for file in (ROOT / name).rglob("*.py"))
    found = [file for file in files if "ORT_DISABLE_TELEMETRY" in file.read_text(encoding="utf-8")]
    assert found == [ROOT / "runtime" / "root" / "__init__.py"]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_nothing_is_written_at_home_from_node(bundle, tmp_path):
    program = ROOT / "examples" / "browser"
    if not (program / "node_modules" / "onnxruntime-node").is_dir():
        pytest.skip("onnxruntime-node is not installed")
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 16_000, subtype="PCM_16")
    (home := tmp_path / "home").mkdir()
    run(home, "node", "transcribe.mjs", bundle.path, tmp_path / "a.wav", folder=program)
    assert list(home.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_ends(tmp_path):
    assert run(tmp_path, sys.executable, "-c", FORKED) == "7\n"
