"""Files written by a release, and steps on other machines, as far as they can be tested offline."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = (".", "runtime/demo", "runtime/kernels")
RELEASED = ("runtime/cpp/include/u2moe.h", "examples/c/rust/Cargo.toml", "examples/c/rust/u2moe/Cargo.toml")
WRITTEN = ("README.md", "CHANGELOG.md", "CITATION.cff", "runtime/web/package.json", "runtime/demo/README.md", *RELEASED)
REPOSITORY = "https://host.example/org/u2moe"
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


@pytest.fixture
def clone(tmp_path):
    """Return a folder with the files that a release changes and a Makefile."""
    for name in ("Makefile", *WRITTEN, *(f"{place}/pyproject.toml" for place in DISTRIBUTIONS)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def read(file):
    return file.read_text(encoding="utf-8")


def make(folder, *arguments):
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_version_is_set_everywhere_once(clone):
    assert "which version?" in make(clone, "version").stdout
    for version in ("9.8.7", "9.8.8"):
        done = make(clone, "version", f"VERSION={version}", f"REPOSITORY={REPOSITORY}")
        assert done.returncode == 0, done.stderr
        for place in DISTRIBUTIONS:
            project = tomllib.loads(read(clone / place / "pyproject.toml"))["project"]
            assert (project["version"], project["urls"]) == (version, {"Repository": REPOSITORY})
        assert f'"version": "{version}"' in read(clone / "runtime/web/package.json")
        assert f"\nversion: {version}\n" in read(clone / "CITATION.cff")
        number = int(version.replace(".", "0"))
        defined = f'#define U2MOE_VERSION "{version}"\n#define U2MOE_VERSION_NUMBER {number} '
        assert defined in read(clone / "runtime/cpp/include/u2moe.h")
        rust = [tomllib.loads(read(clone / "examples/c/rust" / name / "Cargo.toml")) for name in (".", "u2moe")]
        assert rust[0]["workspace"]["package"]["version"] == rust[1]["dependencies"]["u2moe-sys"]["version"] == version
    changes = read(clone / "CHANGELOG.md")
    assert re.findall(r"^## \[(.*?)\]", changes, re.MULTILINE)[:3] == ["Unreleased", "9.8.8", "9.8.7"]


def test_an_index_shows_pictures_and_no_metadata(clone):
    assert make(clone, "readmes", "VERSION=9.8.7", f"REPOSITORY={REPOSITORY}").returncode == 0
    text = read(clone / "README.md")
    assert not re.findall(r"\]\((?!https://)[^)]*\)", text)
    pictures = re.findall(r"!\[[^\]]*\]\((.*?)\)", text)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture.removeprefix(f"{REPOSITORY}/raw/v9.8.7/")).is_file()
    assert read(clone / "runtime/demo/README.md").startswith("\n# u2moe-demo\n")


def test_workflows_cover_what_is_promised():
    yaml = pytest.importorskip("yaml")
    files = (ROOT / ".github/workflows" / f"{name}.yml" for name in ("tests", "release"))
    tests, release = (yaml.safe_load(read(file))["jobs"] for file in files)
    classifiers = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["classifiers"]
    promised = [found[1] for text in classifiers if (found := re.search(r"Python :: (3\.\d+)", text))]
    matrix = tests["runtime"]["strategy"]["matrix"]
    assert matrix["python"] == promised
    assert all(any(system in name for name in matrix["system"]) for system in ("ubuntu", "macos", "windows", "arm"))
    assert matrix["system"] == release["kernels"]["strategy"]["matrix"]["system"]
    published = {part["files"] for part in release["publish"]["strategy"]["matrix"]["include"]}
    assert published == {"u2moe", "u2moe-demo", "."}
    for job in ("publish", "javascript", "image", "documentation", "bindings"):
        assert "installed" in release[job]["needs"]


def test_an_older_python_is_refused_and_a_half_made_environment_is_made_anew(clone):
    """Scripts replace Python: one pretends to be too old, the other records its arguments."""
    scripts = {"old": "echo 'needs Python 3.11' >&2\nexit 1\n", "new": 'echo "$*" >>asked\ntest "$1" = -c\n'}
    for name, text in scripts.items():
        (clone / name).write_text(f"#!/bin/sh\n{text}", encoding="utf-8")
        (clone / name).chmod(0o755)
    done = make(clone, ".venv-demo/ready", "PYTHON=./old", "SOURCES=", "DEMO=")
    assert (done.returncode, "needs Python 3.11" in done.stderr) == (2, True)
    assert not (clone / ".venv-demo").exists()
    (clone / ".venv-demo").mkdir()  # as after an interruption
    make(clone, ".venv-demo/ready", "PYTHON=./new", "SOURCES=", "DEMO=")
    checked, made = read(clone / "asked").splitlines()
    assert "version_info < (3, 11)" in checked
    assert made == "-m venv --clear .venv-demo"
