"""Allowed imports, public names, the glossary, packaged files, and the size of a clone."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

import u2moe.runtime

ROOT = Path(__file__).parent.parent
PACKAGES = ("export", "quantize", "runtime", "benchmarks")
PUBLIC = u2moe.runtime.__all__  # test_documentation compares them with the pages
ORDER = (
    "errors", "log", "installation", "bundle_location", "validation", "declarations", "whole_file", "result", "text",
    "language", "options", "audio", "bundle", "model", "bundle_folder", "bundle_writer", "graph", "decoding", "stream",
    "recognition", "recognizer", "transcriber_thread", "transcriber", "__init__", "corpus", "server", "cli", "root",
)  # fmt: skip
"""Packages and top-level files, from the lowest layer to the highest. Each imports only earlier ones."""
SEPARATE = {"kernels", "cpp", "web", "demo"}
"""Folders of `runtime/` that are separate distributions, or data."""
LARGEST_TREE, LARGE = 45e6, 1e6
"""Maximum bytes of all files, and the size from which a file must be listed here."""
LISTED = {
    "examples/train_demo/checkpoint/final.pt.xz": "the demo model in WeNet's form, from which its bundle is made",
    "runtime/demo/encoder.onnx": "the demo model",
    "runtime/demo/decoder.onnx": "the demo model",
    "runtime/demo/language.lm": "its language model",
}


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def text_of(*parts):
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def modules():
    """Return the syntax trees of the runtime by module names below `u2moe.runtime`."""
    files = {file.relative_to(ROOT / "runtime").with_suffix("").parts: file for file in ROOT.glob("runtime/**/*.py")}
    return {".".join(parts): ast.parse(text_of(file)) for parts, file in files.items() if parts[0] not in SEPARATE}


def imports(tree, known):
    """Yield (module, name) of all imports from the runtime, including those for types and within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[:2] == ["u2moe", "runtime"]:
            module = ".".join(node.module.split(".")[2:])
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                if inner in known or f"{inner}.__init__" in known:
                    yield (inner if inner in known else f"{inner}.__init__"), ""
                else:
                    yield (module if module in known else f"{module}.__init__".lstrip(".")), alias.name


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def test_packages_and_rooms_import_downhill_without_a_circle_and_no_private_names():
    for file in ROOT.glob("runtime/**/*.py"):
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", text_of(file), re.MULTILINE)
        own = {".".join(name.split(".")[:2]) for name in imported if name.startswith("u2moe.")}
        assert own <= {"u2moe.runtime", "u2moe.commands"}, file
        needs_onnx = any(name.startswith(("onnx_ir", "onnx.", "u2moe.runtime.graph.")) for name in imported)
        assert needs_onnx <= (file.parent.name in ("graph", "kernels")), file
    for package, other in (("export", "quantize"), ("quantize", "export")):
        for file in (ROOT / package).rglob("*.py"):
            assert f"u2moe.{other}" not in text_of(file), file
    known = modules()
    places = {name: ORDER.index(name.split(".")[0]) for name in known}
    assert set(places.values()) == set(range(len(ORDER)))
    found = [(name, *each) for name, tree in known.items() for each in imports(tree, known)]
    assert [each for each in found if places[each[1]] > places[each[0]]] == []
    assert [each for each in found if each[0] != each[1] and is_private(each[2])] == []
    graph = defaultdict(set)
    for name, module, _ in found:
        graph[name] |= {module} - {name}
    TopologicalSorter(graph).prepare()


def test_examples_use_what_is_public():
    pages = "".join(page.read_text(encoding="utf-8") for page in ROOT.glob("docs/api/*.md"))
    allowed = {*re.findall(r"^::: (\S+)", pages, re.MULTILINE)}
    allowed |= {f"{module}.{name}" for module in ("u2moe", "u2moe.runtime") for name in PUBLIC}
    examples = [*ROOT.glob("examples/*.py"), *ROOT.glob("examples/cluster/*.py")]
    assert len(examples) >= 2
    for file in examples:
        used = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(text_of(file)))
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "u2moe"
            for alias in node.names
        }
        assert used
        assert used <= allowed, file


def test_importing_the_runtime_loads_only_what_recognising_needs_and_names_what_is_missing():
    """Slow or optional modules are imported only where they are used."""
    needed = ("numpy", "onnxruntime", "soxr")
    code = f"import sys, pathlib, {', '.join(needed)}; before = {{*sys.modules}}; import u2moe.runtime;"
    code += "print(*({*sys.modules} - before)); import u2moe.runtime.cli; print(*sys.modules)"
    loaded, with_commands = (set(line.split()) for line in python("-c", code).splitlines())
    assert not {"torch", "onnx", "onnx_ir", "soundfile", "asyncio", "u2moe.export"} & with_commands
    packages = {name.partition(".")[0] for name in loaded}
    assert "u2moe" in packages
    assert packages - sys.stdlib_module_names <= {"u2moe", *needed}
    assert not {"argparse", "asyncio", "concurrent", "http", "logging", "multiprocessing", "socket", "subprocess",
                "unittest", "urllib"} & packages  # fmt: skip
    code = "import sys; sys.modules['onnxruntime'] = None; import u2moe; print(u2moe.__version__); import u2moe.runtime"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == version("u2moe")
    hint = "u2moe needs onnxruntime: pip install '.[cpu]' (in a clone of u2moe), or [gpu] instead of [cpu]"
    assert run.stderr.splitlines()[-1] == f"ModuleNotFoundError: {hint}"


def test_public_names_errors_streams_and_licences():
    assert sorted(PUBLIC) == PUBLIC
    assert all(getattr(u2moe.runtime, name).__doc__ for name in PUBLIC)
    errors = [getattr(u2moe.runtime, name) for name in PUBLIC if name.endswith("Error")]
    assert all(issubclass(error, u2moe.runtime.U2moeError) for error in errors)
    # Internals that the recogniser needs are behind `state`
    assert {name for name in dir(u2moe.runtime.Stream) if not name.startswith("_")} == {
        "accept_waveform", "duration", "failure", "get_result", "input_finished", "is_endpoint", "is_ready",
        "missing_s", "options", "reset", "take_segments",
    }  # fmt: skip
    # They are a separate distribution
    assert text_of("runtime", "kernels", "LICENSE") == text_of("LICENSE")


@pytest.mark.slow
def test_the_package_itself_has_the_names_of_the_runtime():
    """Also in the repository's root, where folders of the working directory take precedence."""
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
    assert python("-c", code).strip() == version("u2moe")
    assert python("-m", "u2moe", "--version").strip() == f"u2moe {version('u2moe')}"
    assert version("u2moe") == tomllib.loads(text_of("pyproject.toml"))["project"]["version"]


def tracked():
    """Return the paths of all files in the clone."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a clone")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_every_folder_of_a_package_is_packaged():
    config = tomllib.loads(text_of("pyproject.toml"))["tool"]["setuptools"]
    assert sorted(config["packages"]) == sorted(config["package-dir"])
    others = {ROOT / "runtime" / name for name in SEPARATE}
    others |= {ROOT / "benchmarks" / name for name in ("studies", "results")}  # they only run in a clone
    own = {file.parent for file in tracked() if file.relative_to(ROOT).parts[0] in PACKAGES}
    own = {folder for folder in own if others.isdisjoint((folder, *folder.parents))}
    assert own == {ROOT / folder for folder in config["package-dir"].values()} - {ROOT / "runtime/web"}


def test_a_clone_is_small_and_large_files_have_reasons():
    """Training states and results of runs belong elsewhere, because the history keeps every version forever."""
    sizes = {file.relative_to(ROOT).as_posix(): file.stat().st_size for file in tracked()}
    assert {name for name, size in sizes.items() if size > LARGE} == set(LISTED)
    assert sum(sizes.values()) <= LARGEST_TREE
    assert "git clone --depth 1" in text_of("README.md")


def test_no_two_public_classes_share_a_name_and_words_are_explained_once():
    places = defaultdict(list)
    for file in (file for top in PACKAGES for file in (ROOT / top).rglob("*.py")):
        for name in re.findall(r"^class ([A-Za-z]\w*)", text_of(file), re.MULTILINE):
            places[name].append(file)
    assert len(places) > 100
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
    page = text_of("docs", "how", "words.md")
    words = re.findall(r"^\| \*\*([a-z ]+)\*\* \| [A-Z`].*\. \|$", page, re.MULTILINE)
    assert len(words) == len(set(words)) == page.count("| **")
    assert len(words) <= 40, "keep the glossary short"
