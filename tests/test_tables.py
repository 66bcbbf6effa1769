import json
from pathlib import Path

import pytest

from u2moe.benchmarks import tables
from u2moe.benchmarks.tables import main, updated
from u2moe.benchmarks.targets import Target

FOLDER = Path(__file__).parent.parent / "benchmarks"


def test_the_readme_says_what_the_results_say():
    assert main(["--check", "--folder", str(FOLDER)]) == 0


def test_a_table_replaces_what_stands_between_its_marks_and_nothing_else():
    text = "# A\n\n<!-- begin full_size -->\nold \\1\n<!-- end full_size -->\n\nkept\n"
    once = updated(text, {"full_size": "| new \\1 |\n"})
    assert once == "# A\n\n<!-- begin full_size -->\n| new \\1 |\n<!-- end full_size -->\n\nkept\n"
    assert updated(once, {"full_size": "| new \\1 |\n"}) == once


def test_a_table_without_marks_gets_a_section_once():
    once = updated("# A\n", {"levers": "| x |\n"})
    assert once.startswith("# A\n\n## Faster at the price of words\n\n<!-- begin levers -->\n| x |\n")
    assert updated(once, {"levers": "| x |\n"}) == once
    assert updated(once, {}) == once


def test_a_mark_without_its_end_would_swallow_the_rest():
    with pytest.raises(ValueError, match="without <!-- end levers -->"):
        updated("<!-- begin levers -->\n\nkept\n", {"levers": "| x |"})


class Module:
    def __init__(self, name):
        self.name = name

    def table(self, results):
        return f"| {self.name} {results['x']} |"


class WithTargets(Module):
    def targets(self, results):
        return [Target(name=self.name, found=results["x"], limit=2, at_most=True, unit=" s", bound="light")]


def test_the_command_writes_once_and_check_notices_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_module", Module)
    (tmp_path / "results").mkdir()
    results = tmp_path / "results" / "full_size.json"
    results.write_text(json.dumps({"x": 1}))
    options = ["--folder", str(tmp_path)]
    assert main(["--check", *options]) == 1
    assert not (tmp_path / "README.md").exists()
    assert main(options) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| full_size 1 |" in text
    assert "begin targets" not in text
    assert main(["--check", *options]) == 0
    results.write_text(json.dumps({"x": 2}))
    assert main(["--check", *options]) == 1


def test_targets_of_all_tables_are_gathered_before_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_module", lambda name: Module(name) if name == "overhead" else WithTargets(name))
    for name, x in (("full_size", 1), ("overhead", 2), ("levers", 3)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"x": x}))
    found = tables.tables(tmp_path)
    assert list(found) == ["targets", "full_size", "overhead", "levers"]
    rows = found["targets"].splitlines()[2:]
    assert rows == ["| full_size | 1 s | ≤ 2 s | met |", "| levers | 3 s | ≤ 2 s | **not met**: light |"]


def test_a_target_is_kept_on_its_own_side():
    below = {"name": "x", "found": 1.4, "limit": 1.5}
    assert Target(**below, at_most=True).met
    assert not Target(**below, at_most=False).met
    assert Target(**below, at_most=False).row == "| x | 1.4 | ≥ 1.5 | **not met** |"
    assert Target(name="x", found=1234.5, limit=1234.5, at_most=False).row == "| x | 1234 | ≥ 1234 | met |"


def test_every_module_of_a_table_that_is_there_can_make_it():
    present = [name for name in tables.TITLES if (FOLDER / f"{name}.py").exists() or name == "full_size"]
    assert {"full_size", "kernel_peers"} <= set(present) - {"targets"}
    for name in present:
        if name != tables.TARGETS:
            assert callable(tables._module(name).table)
