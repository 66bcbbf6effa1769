"""Compiles the core to runtime/web/core.wasm: `make web`, or in an environment with COMPILER this script; a file may be its argument.

The same compiler gives the same bytes, wherever the repository lies; another version gives others.
"""

import re
import subprocess
import sys
from pathlib import Path

COMPILER = "ziglang==0.17.1"
ROOT = Path(__file__).parents[2]
FLAGS = (
    "-target wasm32-wasi -mexec-model=reactor -mcpu=generic+simd128 -std=c++17 -Os -flto -fno-exceptions -fno-rtti"
    " -ffp-contract=off -Wall -Wextra -s -Wl,--export=malloc,--export=free,--export=__stack_pointer,-z,stack-size=1048576"
    " -Iruntime/cpp/source -Iruntime/cpp/include"
).split()


def build(out: Path) -> None:
    """Write the module to `out`."""
    cmake = (ROOT / "runtime" / "cpp" / "CMakeLists.txt").read_text(encoding="utf-8")
    core = re.search(r"set\(core\s+([^)]*)\)", cmake)[1].split()
    sources = ["runtime/web/core.cpp", "tests/cpp/cases.cpp", *(f"runtime/cpp/{file}" for file in core)]
    command = [sys.executable, "-m", "ziglang", "c++", *FLAGS, *sources, "-o", out.resolve()]
    subprocess.run(command, cwd=ROOT, check=True)
    out.chmod(0o644)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runtime" / "web" / "core.wasm")
