"""The documentation: the site is built without a warning and without other hosts, and its commands run."""

import dataclasses
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import soundfile

import u2moe.export
import u2moe.quantize
import u2moe.runtime
from u2moe.benchmarks.bench import plan
from u2moe.benchmarks.instruments import rates, workload
from u2moe.export.random_checkpoint import random_config, write_random_checkpoint
from u2moe.runtime import cli
from u2moe.runtime.bundle_location import DEMO_FOLDER

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOREIGN = re.compile(r"<(?:script|img|iframe|source|audio|video|link)\b[^>]*?\b(?:src|href)=\"?(?:https?:)?//[^\s\">]+")


def commands(page):
    """Return the commands in the shell blocks of a page, as lists of words without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [list(words) for line in lines for is_and, words in itertools.groupby(line, "&&".__eq__) if not is_and]


def test_the_site_is_built_and_fetches_nothing_from_other_hosts(tmp_path):
    pytest.importorskip("material", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    site, environment = tmp_path / "site", {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(site)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not FOREIGN.findall(text), page
        assert not re.search(r"^(<p>)?\{\{ \w+", text, re.MULTILINE), page
    for sheet in site.rglob("*.css"):
        assert "//fonts." not in sheet.read_text(encoding="utf-8"), sheet
    files = (site / "how" / "files" / "index.html").read_text(encoding="utf-8")
    for folder in PROJECT["tool"]["setuptools"]["package-dir"].values():
        for file in (ROOT / folder).glob("*.py"):
            assert file.name == "__init__.py" or f"<code>{file.name}</code>" in files, file
    assert "--weights FILE" in (site / "export" / "index.html").read_text(encoding="utf-8")


def test_every_public_name_is_described_once():
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    for package in (u2moe.runtime, u2moe.export, u2moe.quantize):
        described = re.findall(rf"^::: {package.__name__}\.(\w+)$", text, re.MULTILINE)
        assert sorted(described) == sorted(package.__all__)


def test_commands_are_understood(monkeypatch):
    monkeypatch.setattr(sys, "exit", lambda code: pytest.fail(f"exit {code}"))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line in itertools.chain.from_iterable(map(commands, PAGES)):
        words = line[len(line) - line[::-1].index("|") :] if "|" in line else line  # what ends a pipe is ours
        program, *arguments = Path(words[0]).name, *words[1:]
        if program == "u2moe":
            cli.parser(arguments).parse_args(arguments)
        elif program == "make":
            assert set(arguments) <= set(targets), words
        elif program == "pip":
            for extras in re.findall(r"\[(.*?)\]", " ".join(arguments)):
                assert set(extras.split(",")) <= PROJECT["project"]["optional-dependencies"].keys(), words
        elif program in ("python", "python3") and arguments[0] == "-m":
            assert importlib.util.find_spec(arguments[1]), words
        elif program in ("python", "pytest"):
            assert (ROOT / arguments[0]).is_file(), words
        else:
            assert program in ("ruff", "mkdocs", "curl", "openssl"), words


def test_files_that_are_named_are_there():
    """Also those that a table names after the first without their folder."""
    placeholder = re.compile(r"[A-Z]{3,}")
    for page in [*PAGES, *(ROOT / "docs" / "how").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"`((?:runtime|export|quantize|benchmarks|tests|examples|docs)/[\w./]*)`", text)
        for name in named:
            if not placeholder.search(Path(name).stem) and not placeholder.search(name.split("/")[1]):
                assert (ROOT / name).exists(), (page, name)
        folders = {(ROOT / name).parent for name in named} | {ROOT / "tests"}
        for name in re.findall(r"`(\w+\.py)`", text):
            assert any((folder / name).is_file() for folder in folders), (page, name)
        for target in re.findall(r"\]\((?!\w+:|#)([^)#]+)", text):
            assert (page.parent / target).exists(), (page, target)


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """Return a folder with the files that the commands name, with a tiny model, and the commands that have run."""
    folder = tmp_path_factory.mktemp("commands")
    clips = sorted((DEMO_FOLDER / "clips").glob("*.flac"))
    one = {"num_blocks": 1, "mlp_type": "moe", "n_expert": 4}
    config = random_config(encoder_conf=one, decoder_conf={"num_blocks": 1, "r_num_blocks": 1})
    write_random_checkpoint(folder / "exp" / "u2pp_moe", config, seed=2)
    for name in ("lectures", "recordings"):
        (folder / name).mkdir()
        shutil.copy(clips[0], folder / name / "first.flac")
    # As many tokens as it takes to show that few of them change.
    (folder / "speech").mkdir()
    samples, rate = soundfile.read(clips[0])
    soundfile.write(folder / "speech" / "long.flac", np.tile(samples, 16), rate)
    for name in ("talk.wav", "talk.mp3", "meeting.flac"):  # the suffix does not matter
        shutil.copy(clips[0], folder / name)
    for name in ("talk.txt", "lectures/first.txt"):
        (folder / name).write_text("Seven.", encoding="utf-8")
    (folder / "data.list").write_text('{"key": "talk", "wav": "talk.wav", "txt": "SEVEN"}\n', encoding="utf-8")
    (folder / "commands.txt").write_text("<digit> = one | five\n<digit> [<digit>]\n[unk]\n", encoding="utf-8")
    (folder / "names.txt").write_text("SEVEN\nCLUBS :2.5\n", encoding="utf-8")
    # many words: a network with random weights gets as many wrong in int8 as in float32, within 0.5 %
    (folder / "test.tsv").write_text(f"{clips[0]}\t{'你好 ' * 1_500}\n", encoding="utf-8")
    return folder, []


@pytest.mark.parametrize("name", ["../README", "export", "quantize", "recognise"])
def test_commands_run(name, surroundings, export_quickly, monkeypatch, capsys):
    """Commands find what earlier ones have written. The same command on another page does not run again."""
    folder, done = surroundings
    monkeypatch.chdir(folder)
    monkeypatch.setattr(plan, "_PROCESSES", 1)  # what is measured is not looked at
    monkeypatch.setattr(rates, "_CALL_S", 0.005)
    monkeypatch.setattr(workload, "UTTERANCE_S", 1.0)
    monkeypatch.setitem(workload.NUM_CHUNKS, "streaming-8", 1)
    monkeypatch.setitem(plan.PLANS, "quick", dataclasses.replace(plan.PLANS["quick"], repetitions=1))
    if name == "quantize" and not (folder / "bundle").exists():
        export_quickly(folder / "exp" / "u2pp_moe", folder / "bundle")
    before = len(done)
    for words in commands(ROOT / "docs" / f"{name}.md"):
        if words[0] == "u2moe" and words[1] not in ("listen", "serve") and words not in done:
            codes = (0, 3) if words[1] == "quantize" else (0,)  # 3: random weights may change more than 10 % of tokens
            assert cli.main(words[1:]) in codes, (words, capsys.readouterr().err)
            done.append(words)
    assert len(done) - before >= 3
