"""Run modules of runtime/web in Node."""

import json
import shutil
import subprocess

import pytest
from browsing import BROWSER, PATIENCE_MS, WEB

NODE = shutil.which("node")
_PRELUDE = f"""
const input = JSON.parse(await new Response(process.stdin).text());
const part = (file) => import({json.dumps(WEB.as_uri())} + "/" + file);
"""
needs_node = pytest.mark.skipif(NODE is None, reason="needs Node: apt-get install nodejs")


def run_module(code, data=None, *flags):
    """Return the JSON output of a module that reads `input`; `part` imports a file of the package."""
    command = [NODE, *flags, "--input-type=module", "-e", f"{_PRELUDE}\n{code}"]
    done = subprocess.run(
        command, input=json.dumps(data), cwd=BROWSER, capture_output=True, text=True, check=False,
        timeout=PATIENCE_MS / 1000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
