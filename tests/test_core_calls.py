"""Random calls of the C++ core functions that JavaScript uses, compiled with sanitizers instead of to WebAssembly."""

import re
import shutil
import subprocess

import pytest
from browsing import ROOT
from language_models import random_arpa

from u2moe.runtime.language.files import read_arpa, write_compact

CPP = ROOT / "runtime" / "cpp"
FLAGS = ["-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-attributes", "-g1"]
pytestmark = [
    pytest.mark.endurance,  # compiling takes two minutes
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: apt-get install g++"),
]


@pytest.mark.timeout(2400)
def test_nothing_that_a_program_or_a_bundle_gives_does_more_than_fail(exported, tmp_path):
    """Any manifest, vocabulary, language model, option, audio or graph output returns a result or a u2moe error."""
    core = re.search(r"(?ms)^set\(core(.*?)\)", (CPP / "CMakeLists.txt").read_text(encoding="utf-8"))[1].split()
    sources = [
        ROOT / "tests" / "cpp" / "core_calls.cpp", ROOT / "tests" / "cpp" / "cases.cpp", *map(CPP.joinpath, core),
    ]  # fmt: skip
    folders = [f"-I{CPP / 'source'}", f"-I{CPP / 'include'}"]
    command = ["g++", *FLAGS, "-O1", *folders, *sources, "-o", tmp_path / "core_calls"]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("bundle.json", "tokens.txt"):
        shutil.copy(exported("dense_tiny") / name, tmp_path)
    (tmp_path / "model.arpa").write_text(random_arpa(0, ("七", "A", "下"), 3), encoding="utf-8")
    write_compact(read_arpa(tmp_path / "model.arpa"), tmp_path / "model.lm")
    command = [tmp_path / "core_calls", tmp_path, "0", str(10**9), "600"]  # seed, number of calls, seconds
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    num, refused = map(int, done.stdout.split())
    assert 0 < refused < num
