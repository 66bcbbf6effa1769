"""onnxruntime's telemetry is disabled before onnxruntime is imported."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def python(code, home, *arguments, **environment):
    """Return the output of a program with the home folder `home`, without the variable set for the tests."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**inherited, "HOME": str(home), "USERPROFILE": str(home), **environment}, capture_output=True, text=True,
        check=True, timeout=120,
    )  # fmt: skip
    return done.stdout


def test_nothing_is_written_at_home_and_the_variable_is_set_by_the_package_alone(bundle, tmp_path):
    code = "import sys; from u2moe import Recognizer; Recognizer.from_pretrained(sys.argv[1]).warm_up()"
    python(code, tmp_path, str(bundle.path))
    assert list(tmp_path.iterdir()) == []
    # Every import of u2moe executes the top-level package first
    code = "import os, u2moe; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert python(code, tmp_path) == "1\n"
    assert python(code, tmp_path, ORT_DISABLE_TELEMETRY="0") == "0\n"
    # Only the top-level package sets it, because every import executes it. Other places may be too late
    found = [
        str(file.relative_to(ROOT))
        for folder in ("runtime", "export", "quantize", "benchmarks")
        for file in (ROOT / folder).rglob("*.py")
        if re.search(r"ORT_DISABLE_TELEMETRY", file.read_text(encoding="utf-8"))
    ]
    assert found == [str(Path("runtime/root/__init__.py"))]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_nothing_is_written_at_home_from_node(tmp_path):
    program = ROOT / "examples" / "browser"
    if not (program / "node_modules" / "onnxruntime-node").is_dir():
        pytest.skip("onnxruntime-node is not installed")
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 16_000, subtype="PCM_16")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    home = tmp_path / "home"
    home.mkdir()
    command = ["node", "transcribe.mjs", str(ROOT / "runtime" / "demo"), str(tmp_path / "a.wav")]
    subprocess.run(command, cwd=program, env={**inherited, "HOME": str(home)}, check=True, timeout=120)
    assert list(home.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_ends(tmp_path):
    code = """
import os, signal, sys, time
import u2moe.runtime

child = os.fork()
if child == 0:
    sys.exit(7)
end = time.monotonic() + 60
while os.waitpid(child, os.WNOHANG) == (0, 0):
    if time.monotonic() > end:
        os.kill(child, signal.SIGKILL)
        sys.exit("the child hangs")
    time.sleep(0.01)
print("ended")
"""
    assert python(code, tmp_path) == "ended\n"
