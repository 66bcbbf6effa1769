"""Allowed imports, public names and packaged files."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import u2moe.runtime

ROOT = Path(__file__).parent.parent

PUBLIC = [
    "Alignment", "AlignmentError", "Alternative", "AudioError", "AudioOverflowError", "AudioWarning", "Bundle",
    "BundleError", "BundleWarning", "BundleWriter", "CheckpointError", "ContextGraph", "CorpusError", "DecodingOptions",
    "EndpointConfig", "EndpointRule", "Fusion", "Grammar", "GrammarError", "Hypothesis", "IntegrityError", "Kernels",
    "KernelsError", "LanguageModel", "LanguageModelError", "LanguageModelOptions", "Microphone", "MicrophoneError",
    "Model", "ParityError", "PhraseResult", "PrefixBeamSearch", "ProviderError", "QuantizationError", "RawAudio",
    "Recognizer", "Rescored", "RescoringWeights", "Result", "Runner", "SessionSettings", "SignatureError", "Stream",
    "StreamError", "SubtitleOptions", "TextFormat", "TextFormatter", "Transcriber", "Transcript", "TruncatedAudioError",
    "U2moeError", "UnsupportedError", "VadOptions", "VoiceActivityDetector", "WordResult", "attention_beam_search",
    "attention_rescoring", "ctc_greedy_search", "ctc_prefix_beam_search", "format_transcript", "parse_hotwords",
]  # fmt: skip


def python(*arguments, cwd=None):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=cwd).stdout


def test_imports_of_the_runtime_are_its_own_without_torch_and_onnx():
    loaded = python("-c", "import u2moe.runtime, u2moe.runtime.cli, sys; print(*sys.modules)").split()
    assert "onnxruntime" in loaded
    assert not {"torch", "onnx", "onnx_ir", "soundfile", "asyncio", "u2moe.export"} & set(loaded)
    for file in (ROOT / "runtime").rglob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) (u2moe\.\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(imported) <= {"u2moe.runtime", "u2moe.commands"}, file
    for file in (ROOT / "runtime").rglob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        needs_onnx = any(name.startswith(("onnx_ir", "onnx.", "u2moe.runtime.graph.")) for name in imported)
        assert needs_onnx <= (file.parent.name in ("graph", "kernels")), file
    for package, other in (("export", "quantize"), ("quantize", "export")):
        for file in (ROOT / package).rglob("*.py"):
            assert f"u2moe.{other}" not in file.read_text(encoding="utf-8"), file


def test_importing_the_runtime_loads_only_what_recognising_needs_and_names_what_is_missing():
    """Slow or optional modules are imported only where they are used."""
    needed = ("numpy", "onnxruntime", "soxr")
    code = f"import sys, pathlib, {', '.join(needed)}; before = {{*sys.modules}}; import u2moe.runtime;"
    loaded = set(python("-c", f"{code} print(*({{*sys.modules}} - before))").split())
    packages = {name.partition(".")[0] for name in loaded}
    assert "u2moe" in packages
    assert packages - sys.stdlib_module_names <= {"u2moe", *needed}
    assert not {"argparse", "asyncio", "concurrent", "http", "logging", "multiprocessing", "socket", "subprocess",
                "unittest", "urllib"} & packages  # fmt: skip
    code = "import sys; sys.modules['onnxruntime'] = None; import u2moe; print(u2moe.__version__); import u2moe.runtime"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == version("u2moe")
    assert (
        run.stderr.splitlines()[-1]
        == "ModuleNotFoundError: u2moe needs onnxruntime: pip install '.[cpu]' (in a clone of u2moe), "
        "or [gpu] instead of [cpu]"
    )


def test_public_names_errors_streams_and_licences():
    assert sorted(u2moe.runtime.__all__) == u2moe.runtime.__all__ == PUBLIC
    assert all(getattr(u2moe.runtime, name).__doc__ for name in PUBLIC)
    errors = [getattr(u2moe.runtime, name) for name in PUBLIC if name.endswith("Error")]
    assert all(issubclass(error, u2moe.runtime.U2moeError) for error in errors)
    # Internals that the recogniser needs are behind `state`
    assert {name for name in dir(u2moe.runtime.Stream) if not name.startswith("_")} == {
        "accept_waveform", "duration", "failure", "get_result", "input_finished", "is_endpoint", "is_ready",
        "missing_s", "options", "reset", "take_segments",
    }  # fmt: skip
    # They are a separate distribution
    assert (ROOT / "runtime" / "kernels" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["repository", "elsewhere"])
def test_the_package_itself_has_the_names_of_the_runtime(place, tmp_path):
    """This also works in the repository's root, where folders of the working directory take precedence."""
    cwd = ROOT if place == "repository" else tmp_path
    code = (
        "import sys, u2moe; assert 'u2moe.runtime' not in sys.modules and 'numpy' not in sys.modules;"
        "assert u2moe.runtime is sys.modules['u2moe.runtime'];"
        "from u2moe import Recognizer, Bundle; import u2moe.runtime as runtime;"
        "assert Recognizer is runtime.Recognizer and Bundle is runtime.Bundle;"
        "names = {}; exec('from u2moe import *', names); assert set(runtime.__all__) < set(names);"
        "assert set(dir(u2moe)) == {*runtime.__all__, '__version__'};"
        "assert not hasattr(u2moe, 'Resampler') and not hasattr(u2moe, 'recogniser');"
        "print(u2moe.__version__)"
    )
    assert python("-c", code, cwd=cwd).strip() == version("u2moe")
    assert python("-m", "u2moe", "--version", cwd=cwd).strip() == f"u2moe {version('u2moe')}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert version("u2moe") == project["version"]


def test_every_folder_of_a_package_is_packaged():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(config["packages"]) == sorted(config["package-dir"])
    on_disk = {
        file.parent
        for top in ("export", "runtime", "quantize", "benchmarks")
        for file in (ROOT / top).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    tracked_folders = {(ROOT / name).parent for name in tracked.splitlines()}
    packaged = {ROOT / folder for folder in config["package-dir"].values()} - {ROOT / "runtime/web"}
    others = {ROOT / "runtime" / name for name in ("cpp", "demo", "kernels", "web")}  # separate distributions
    others |= {ROOT / "benchmarks" / name for name in ("studies", "results")}  # they only run in a clone
    own = {folder for folder in on_disk & tracked_folders if others.isdisjoint((folder, *folder.parents))}
    assert own == packaged
