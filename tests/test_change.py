"""The instructions of docs/change.md name all files of a change: those that mention an existing example."""

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "change.md").read_text(encoding="utf-8")
RECIPES = {
    text.partition("\n")[0]: re.findall(r"^\| (?!file|---)(.*?) \|", text, re.MULTILINE)
    for text in PAGE.split("\n## ")[1:]
}
"""First column of each section's table, by title."""
LEFT_OUT = (
    "*.json", "*.xz", "*.onnx", "*.lm", "*.png", "*.wasm", "tests/golden/*", "runtime/kernels/source/declared.h",
    "runtime/cpp/source/declared.hpp", "runtime/cpp/include/u2moe.h", "runtime/web/declared.js",
    "runtime/web/index.d.ts", "CHANGELOG.md", "docs/change.md", "tests/test_change.py",
)  # fmt: skip
"""Files written by scripts or WeNet, and files that name everything."""
MOST = {"Add an activation": 7, "Add a format for experts": 8, "Add an output format": 4,
        "Add a search option or an endpoint rule": 10}  # fmt: skip
"""Maximum number of files that such a change may touch, including pages and tests, if it is not 20."""
NAMES = {
    "Add an encoder": "efficient_conformer", "Add a format for experts": "int4", "Quantize another layer": "front_end",
    "Add a list format": "kaldi", "Add a protocol of the server": "vosk", "Add a measurement": "word_times",
}  # fmt: skip
"""Replacement of the placeholder in file names."""
EXAMPLES = {
    "Add an activation": ("hardtanh", "runtime/kernels/source/programs/cases.h"),
    "Add a layer variant": ("rms_norm|RmsNorm", "quantize/smoothing.py", "tests/*"),
    "Add an encoder": ("efficient_conformer|efficientConformer", "tests/test_training_config.py", "docs/npu.md"),
    "Add a recipe": ("int8-experts", "tests/*"),
    "Add a format for experts": ("Int4Conversion|'int4'",),
    "Quantize another layer": ("quantize_front_end",),
    "Add an output format": ("ctm", "runtime/cli/transcribe.py"),
    "Add a list format": ("[Ll]hotse",),
    "Add a protocol of the server": (
        "vosk|Vosk", "README.md", "docs/results/systems.md", "runtime/cli/serve.py", "tests/server/*"
    ),
    "Add a search option or an endpoint rule": ("length_penalty", "examples/c/rust/u2moe-sys/src/lib.rs", "tests/*"),
    "Add a field to the manifest": (
        "chunk_multiple", "export/*", "docs/export.md", "runtime/model/encoder.py", "runtime/decoding/*",
        "runtime/cpp/source/recognition.hpp", "tests/test_static.py",
    ),
    "Add a measurement": (
        "word_times", "docs/recognise.md", "examples/train_demo/measurements.py", "tests/test_pauses.py",
    ),
}  # fmt: skip
"""Regular expression for the names of an existing example, as whole words, and files that mention it but would not have
to mention another one."""


def files_of(title):
    """Yield the files and folders that a section names. A name without a folder is in the folder of the name before."""
    for cell in RECIPES[title]:
        folder = ""
        for name in re.findall("`(.*?)`", cell):
            path = name if "/" in name or (ROOT / name).is_file() else folder + name
            folder = path[: path.rfind("/") + 1]
            yield re.sub(r"(?<![A-Z])(?:KIND|FORMAT|NAME)(?![A-Z])", NAMES.get(title, ""), path)


def test_every_recipe_has_an_example():
    assert EXAMPLES.keys() == {title for title, rows in RECIPES.items() if rows}


@pytest.mark.parametrize("title", EXAMPLES)
def test_a_recipe_names_few_files_that_exist_and_every_file_of_its_example(title):
    named, (words, *uses) = list(files_of(title)), EXAMPLES[title]
    assert [name for name in named if not (ROOT / name).exists()] == []
    num_files = sum(1 if " or " in cell else len(re.split("[,;] ", cell)) for cell in RECIPES[title])
    assert num_files <= MOST.get(title, 20)
    command = ["git", "grep", "-lwE", "-e", words]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode > 1:
        pytest.skip("not a clone")
    known = [f"{name}*" if name.endswith("/") else name for name in (*named, *uses, *LEFT_OUT)]
    touched = found.stdout.splitlines()
    assert [name for name in touched if not any(fnmatch(name, pattern) for pattern in known)] == []
    assert any(name in touched for name in named), "the example is not named there"
