"""The instructions of docs/change.md name all files of a change: those that mention an existing example."""

import re
import subprocess
from dataclasses import dataclass
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
    "*.json", "*.npz", "*.onnx", "*.lm", "*.png", "*.wasm", "tests/golden/*", "runtime/kernels/source/declared.h",
    "runtime/cpp/source/declared.hpp", "runtime/cpp/include/u2moe.h", "runtime/web/declared.js",
    "runtime/web/index.d.ts", "CHANGELOG.md", "docs/change.md", "tests/test_change.py",
)  # fmt: skip
"""Files written by scripts or WeNet, and files that name everything."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An existing example of a change.

    Attributes:
        words: regular expression for its names, as whole words.
        name: replacement of the placeholder in file names.
        most: maximum number of files that such a change may touch, including pages and tests.
        uses: files that mention the example, but would not have to mention another one.
    """

    words: str
    name: str = ""
    most: int = 20
    uses: tuple[str, ...] = ()


EXAMPLES = {
    "Add an activation": Example(words="hardtanh", most=7, uses=("runtime/kernels/source/programs/cases.h",)),
    "Add a layer variant": Example(words="rms_norm|RmsNorm", uses=("quantize/smoothing.py", "tests/*")),
    "Add an encoder": Example(
        words="efficient_conformer|efficientConformer",
        name="efficient_conformer",
        uses=("tests/test_training_config.py", "docs/npu.md"),
    ),
    "Add a recipe": Example(words="int8-experts", uses=("tests/*",)),
    "Add a format for experts": Example(words="Int4Conversion|'int4'", name="int4", most=8),
    "Quantize another layer": Example(words="quantize_front_end", name="front_end"),
    "Add an output format": Example(words="ctm", most=4, uses=("runtime/cli/transcribe.py",)),
    "Add a list format": Example(words="[Ll]hotse", name="kaldi"),
    "Add a protocol of the server": Example(
        words="vosk|Vosk", name="vosk",
        uses=("README.md", "docs/results/systems.md", "runtime/cli/serve.py", "tests/server/*"),
    ),
    "Add a search option or an endpoint rule": Example(
        words="length_penalty", most=10, uses=("examples/c/rust/u2moe-sys/src/lib.rs", "tests/*")
    ),
    "Add a field to the manifest": Example(
        words="chunk_multiple",
        uses=(
            "export/*", "docs/export.md", "runtime/model/encoder.py", "runtime/decoding/*",
            "runtime/cpp/source/recognition.hpp", "tests/test_static.py",
        ),
    ),
    "Add a measurement": Example(
        words="word_times", name="word_times",
        uses=("docs/recognise.md", "examples/train_demo/measurements.py", "tests/test_pauses.py"),
    ),
}  # fmt: skip


def files_of(title):
    """Yield the files and folders that a section names. A name without a folder is in the folder of the name before."""
    for cell in RECIPES[title]:
        folder = ""
        for name in re.findall("`(.*?)`", cell):
            path = name if "/" in name or (ROOT / name).is_file() else folder + name
            folder = path[: path.rfind("/") + 1]
            yield re.sub(r"(?<![A-Z])(?:KIND|FORMAT|NAME)(?![A-Z])", EXAMPLES[title].name, path)


def test_every_recipe_has_an_example():
    assert EXAMPLES.keys() == {title for title, rows in RECIPES.items() if rows}


@pytest.mark.parametrize("title", EXAMPLES)
def test_a_recipe_names_files_that_exist_and_few(title):
    assert [name for name in files_of(title) if not (ROOT / name).exists()] == []
    num_files = sum(1 if " or " in cell else len(re.split("[,;] ", cell)) for cell in RECIPES[title])
    assert num_files <= EXAMPLES[title].most


@pytest.mark.parametrize("title", EXAMPLES)
def test_a_recipe_names_every_file_of_its_example(title):
    example = EXAMPLES[title]
    command = ["git", "grep", "-lwE", "-e", example.words]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode > 1:
        pytest.skip("not a clone")
    known = [f"{name}*" if name.endswith("/") else name for name in (*files_of(title), *example.uses, *LEFT_OUT)]
    touched = found.stdout.splitlines()
    assert [name for name in touched if not any(fnmatch(name, pattern) for pattern in known)] == []
    assert any(name in touched for name in files_of(title)), "the example is not named there"
