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


def make(folder, *arguments):
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_version_is_set_everywhere_once(clone):
    assert "which version?" in make(clone, "version").stdout
    for version in ("9.8.7", "9.8.8"):
        done = make(clone, "version", f"VERSION={version}", f"REPOSITORY={REPOSITORY}")
        assert done.returncode == 0, done.stderr
        for place in DISTRIBUTIONS:
            project = tomllib.loads((clone / place / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            assert (project["version"], project["urls"]) == (version, {"Repository": REPOSITORY})
        assert f'"version": "{version}"' in (clone / "runtime/web/package.json").read_text(encoding="utf-8")
        assert f"\nversion: {version}\n" in (clone / "CITATION.cff").read_text(encoding="utf-8")
        header = (clone / "runtime/cpp/include/u2moe.h").read_text(encoding="utf-8")
        number = int(version.replace(".", "0"))
        assert f'#define U2MOE_VERSION "{version}"\n#define U2MOE_VERSION_NUMBER {number} ' in header
        rust = [tomllib.loads((clone / "examples/c/rust" / name / "Cargo.toml").read_text()) for name in (".", "u2moe")]
        assert rust[0]["workspace"]["package"]["version"] == rust[1]["dependencies"]["u2moe-sys"]["version"] == version
    changes = (clone / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.*?)\]", changes, re.MULTILINE)[:3] == ["Unreleased", "9.8.8", "9.8.7"]


def test_an_index_shows_pictures_and_no_metadata(clone):
    assert make(clone, "readmes", "VERSION=9.8.7", f"REPOSITORY={REPOSITORY}").returncode == 0
    text = (clone / "README.md").read_text(encoding="utf-8")
    assert not re.findall(r"\]\((?!https://)[^)]*\)", text)
    pictures = re.findall(r"!\[[^\]]*\]\((.*?)\)", text)
    assert pictures
    for picture in pictures:
        prefix = f"{REPOSITORY}/raw/v9.8.7/"
        assert picture.startswith(prefix)
        assert (ROOT / picture.removeprefix(prefix)).is_file()
    assert (clone / "runtime/demo/README.md").read_text(encoding="utf-8").startswith("\n# u2moe-demo\n")


def test_workflows_cover_what_is_promised():
    yaml = pytest.importorskip("yaml")
    tests, release = (
        yaml.safe_load((ROOT / ".github/workflows" / f"{name}.yml").read_text(encoding="utf-8"))["jobs"]
        for name in ("tests", "release")
    )
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["classifiers"]
    promised = [found[1] for text in classifiers if (found := re.search(r"Python :: (3\.\d+)", text))]
    matrix = tests["runtime"]["strategy"]["matrix"]
    assert matrix["python"] == promised
    for system in ("ubuntu", "macos", "windows", "arm"):
        assert any(system in name for name in matrix["system"])
    assert matrix["system"] == release["kernels"]["strategy"]["matrix"]["system"]
    assert {part["files"] for part in release["publish"]["strategy"]["matrix"]["include"]} == {
        "u2moe",
        "u2moe-demo",
        ".",
    }
    assert all(
        "installed" in release[job]["needs"] for job in ("publish", "javascript", "image", "documentation", "bindings")
    )


def test_an_older_python_is_refused_and_a_half_made_environment_is_made_anew(clone):
    """Scripts replace Python: one pretends to be too old, the other records its arguments."""
    old, new = clone / "old", clone / "new"
    old.write_text("#!/bin/sh\necho 'needs Python 3.11' >&2\nexit 1\n", encoding="utf-8")
    new.write_text('#!/bin/sh\necho "$*" >>asked\ntest "$1" = -c\n', encoding="utf-8")
    for program in (old, new):
        program.chmod(0o755)
    done = make(clone, ".venv-demo/ready", "PYTHON=./old", "SOURCES=", "DEMO=")
    assert (done.returncode, "needs Python 3.11" in done.stderr) == (2, True)
    assert not (clone / ".venv-demo").exists()
    (clone / ".venv-demo").mkdir()  # as after an interruption
    make(clone, ".venv-demo/ready", "PYTHON=./new", "SOURCES=", "DEMO=")
    checked, made = (clone / "asked").read_text(encoding="utf-8").splitlines()
    assert "version_info < (3, 11)" in checked
    assert made == "-m venv --clear .venv-demo"
