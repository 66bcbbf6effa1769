"""The C++ program on emulated systems: Windows in wine, and processors of small boards in qemu; and graphs of fixed
shape in the simulator of Qualcomm's HTP, which onnxruntime-qnn has for Linux on x86-64."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import conformance
import numpy as np
import onnxruntime
import pytest
import soundfile
from browsing import BROWSER
from compiled import CHECKS, ROOT, SOURCE, cmake
from conformance import assert_same_segments, recognized

from u2moe.export import convert_static
from u2moe.runtime import Recognizer, SessionSettings
from u2moe.runtime.audio.files import find_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.text.word_errors import WordErrors

pytestmark = [pytest.mark.slow, pytest.mark.endurance]

PROGRAM = ROOT / "examples" / "cpp"
AARCH64 = ROOT / "build" / "aarch64" / "build" / "u2moe_transcribe"
WINDOWS = BROWSER / "node_modules" / "onnxruntime-node" / "bin" / "napi-v6" / "win32" / "x64"
MINGW = "x86_64-w64-mingw32-g++-posix"
WINE = shutil.which("wine64") or "/usr/lib/wine/wine64"
NUM_RECORDINGS = 40
RUN_CASES = """#include <fstream>
#include <iostream>
#include <iterator>
#include "json.hpp"
using namespace u2moe::runtime;
std::string case_results(const std::string& kind, const Json& content);
int main(int, char** argv) {
  std::ifstream file(argv[2]);
  std::cout << case_results(argv[1], Json::parse({std::istreambuf_iterator<char>(file), {}}, argv[2]));
}
"""


def run(*command, **settings):
    done = subprocess.run(list(map(str, command)), capture_output=True, check=False, **settings)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.decode()


def segments(output):
    return [json.loads(line) for line in output.splitlines()]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    clips = [soundfile.read(clip, dtype="int16")[0] for clip in find_audio([DEMO_FOLDER / "clips"])]
    files = []
    for number in range(NUM_RECORDINGS):
        clip = clips[number % len(clips)]
        files.append(folder / f"{number}.wav")
        soundfile.write(files[-1], clip[number * len(clip) // 80 :], 16_000, subtype="PCM_16")
    return files


needs_windows = pytest.mark.skipif(
    not (WINDOWS / "onnxruntime.dll").is_file() or not Path(WINE).is_file() or shutil.which(MINGW) is None,
    reason="needs npm's onnxruntime-node, and apt-get install g++-mingw-w64-x86-64-posix wine64 ninja-build",
)
CROSS = ["-DCMAKE_SYSTEM_NAME=Windows", "-DCMAKE_SYSTEM_PROCESSOR=x86_64", f"-DCMAKE_CXX_COMPILER={MINGW}"]


@needs_windows
def test_the_dll_of_windows_needs_no_other_but_onnxruntime(tmp_path):
    """A C program runs with the installed DLL, which exports exactly the functions of the header."""
    settings = [*CROSS, f"-DONNXRUNTIME_ROOT={WINDOWS}", "-DBUILD_SHARED_LIBS=ON", "-DCMAKE_BUILD_TYPE=None"]
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    cmake("-G", "Ninja", "-S", SOURCE, "-B", build, "-DCMAKE_UNITY_BUILD=ON", *settings)
    cmake("--build", build, "--target", "u2moe")
    cmake("--install", build, "--prefix", prefix)
    assert {file.name for file in (prefix / "bin").iterdir()} == {"u2moe.dll", "onnxruntime.dll"}
    listed = run("x86_64-w64-mingw32-objdump", "-p", prefix / "bin" / "u2moe.dll")
    assert set(re.findall(r"DLL Name: (\S+)", listed)) == {"KERNEL32.dll", "msvcrt.dll", "onnxruntime.dll"}
    exported = re.findall(r"^\s*\[ *\d+\].* (\w+)$", listed.partition("[Ordinal/Name Pointer] Table")[2], re.MULTILINE)
    assert exported == (SOURCE / "u2moe.symbols").read_text(encoding="utf-8").split()
    program, folders = prefix / "bin" / "consumer.exe", (f"-I{prefix / 'include'}", f"-L{prefix / 'lib'}")
    compiler, source = MINGW.replace("g++", "gcc"), CHECKS / "consumer_c" / "main.c"
    run(compiler, source, "-o", program, "-DU2MOE_SHARED", *folders, "-lu2moe")
    environment = {**os.environ, "WINEPREFIX": str(tmp_path / "wine"), "WINEDEBUG": "-all"}
    refusal = "U2MOE_BUNDLE_ERROR: /none/bundle.json: missing, or cannot be read"
    assert run(WINE, program, env=environment).strip() == refusal


@needs_windows
def test_windows_recognises_the_same(recordings, tmp_path):
    """Both sides use native kernels, so that results are identical."""
    pytest.importorskip("u2moe_kernels", reason="u2moe-kernels is not installed", exc_type=ImportError)
    settings = [*CROSS, "-DCMAKE_EXE_LINKER_FLAGS=-static", f"-DONNXRUNTIME_ROOT={WINDOWS}"]
    run("cmake", "-G", "Ninja", "-S", PROGRAM, "-B", tmp_path, *settings)
    run("cmake", "--build", tmp_path)
    shutil.copy(WINDOWS / "onnxruntime.dll", tmp_path)
    environment = {**os.environ, "WINEPREFIX": str(tmp_path / "wine"), "WINEDEBUG": "-all"}
    command = [WINE, tmp_path / "u2moe_transcribe.exe", "--json", "--left-chunks", "4", "--kernels", "native"]
    found = segments(run(*command, DEMO_FOLDER, *recordings, env=environment))
    recognizer = Recognizer.load(settings=SessionSettings(kernels="native"))
    texts = set()
    for file in recordings:
        expected = recognized(recognizer.bundle, recognizer.model, soundfile.read(file, dtype="int16")[0])
        assert_same_segments([line for line in found if line["file"] == str(file)], expected)
        texts |= {segment.text for segment in expected}
    assert len(texts) > NUM_RECORDINGS / 2


@pytest.mark.parametrize("processor", ["cortex-a53", "cortex-a72", "cortex-a76", "max"])
@pytest.mark.skipif(
    not AARCH64.is_file() or shutil.which("qemu-aarch64") is None,
    reason="needs build/aarch64: apt-get install g++-aarch64-linux-gnu qemu-user, then make examples",
)
def test_small_boards_have_all_its_instructions(processor):
    """Raspberry Pi 3, 4, 5 and later. The demo is int8: other kernels round some activations differently."""
    errors = WordErrors()
    emulated = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", processor, AARCH64]
    recognizer = Recognizer.load()
    for clip in find_audio([DEMO_FOLDER / "clips"]):
        samples, rate = soundfile.read(clip, dtype="int16")
        command = [*emulated, "--json", "--left-chunks", 4, "--raw", "--rate", rate, DEMO_FOLDER]
        found = segments(run(*command, input=samples.tobytes()))
        expected = recognized(recognizer.bundle, recognizer.model, samples, rate)
        errors.add(" ".join(each.text for each in expected), " ".join(each["text"] for each in found))
    assert errors.num_words > 10
    assert errors.rate < 0.25


def test_musl_computes_the_cases_as_python(tmp_path):
    """Code that does not need onnxruntime (which has no musl package) is compiled by Zig and linked statically."""
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "venv", tmp_path / "env")
    pip = [python, "-m", "pip", "install", "--quiet", "ziglang"]
    installed = subprocess.run(pip, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"pip finds no compiler: {installed.stderr[-200:]}")
    cpp = ROOT / "runtime" / "cpp"
    core = re.search(r"(?ms)^set\(core(.*?)\)", (cpp / "CMakeLists.txt").read_text(encoding="utf-8"))[1].split()
    (tmp_path / "main.cpp").write_text(RUN_CASES, encoding="utf-8")
    sources = [tmp_path / "main.cpp", ROOT / "tests" / "cpp" / "cases.cpp", *(cpp / name for name in core)]
    command = [python, "-m", "ziglang", "c++", "-target", "x86_64-linux-musl", "-std=c++17", "-O1", "-ffp-contract=off"]
    folders = [f"-I{cpp / 'source'}", f"-I{cpp / 'include'}", "-o", tmp_path / "cases"]
    run(*command, *sources, *folders)
    for kind in conformance.COMPUTED:
        found = run(tmp_path / "cases", kind, conformance.unpacked(kind, tmp_path))
        conformance.assert_same(kind, json.loads(found))


@pytest.mark.parametrize("network", ["moe_tiny", "dense_tiny"])
def test_simulator_of_qualcomm(network, exported, clips, tmp_path):
    """Context binaries are made and loaded without CPU fallback, and have the best tokens of the float graph."""
    pytest.importorskip("onnxruntime_qnn", reason="needs Linux on x86-64, and pip install onnxruntime-qnn")
    files = sorted(clips.glob("*.wav"))
    folder = convert_static(exported(network), tmp_path / "static", recordings=files, qdq=True).path
    names = [each["name"] for each in json.loads((folder / "static.json").read_text())["inputs"]]
    samples = [{name: np.load(folder / "calibration" / f"{row}_{name}.npy") for name in names} for row in range(8)]
    plain = onnxruntime.InferenceSession(folder / "static.onnx")
    expected = [plain.run(["log_probs"], sample)[0].argmax(-1) for sample in samples]
    example = runpy.run_path(str(ROOT / "examples" / "npu" / "qualcomm.py"))
    for compiled, least in ((), 0.98), (("qdq",), 0.9):
        example["main"]("compile", str(folder), *compiled)
        assert (folder / "static_ctx_qnn.bin").stat().st_size > 100_000
        runner = example["QualcommRunner"](folder)
        found = [runner.run(sample)["log_probs"].argmax(-1) for sample in samples]
        assert np.mean([one == other for one, other in zip(expected, found, strict=True)]) >= least
        for file in folder.glob("static_ctx*"):
            file.unlink()
