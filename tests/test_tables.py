import json
from pathlib import Path

import pytest

from u2moe.benchmarks.instruments.statistics import Spread
from u2moe.benchmarks.results import provenance, tables
from u2moe.benchmarks.results.tables import main, updated
from u2moe.benchmarks.results.targets import Target

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
    monkeypatch.setattr(tables, "_module", lambda name: Module(name) if name == "soak" else WithTargets(name))
    for name, x in (("full_size", 1), ("levers", 3), ("soak", 2)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"x": x}))
    found = tables.tables(tmp_path)
    assert list(found) == ["targets", "full_size", "levers", "soak"]
    rows = found["targets"].splitlines()[2:]
    assert rows == ["| full_size | 1 s | ≤ 2 s | met |", "| levers | 3 s | ≤ 2 s | **not met**, by 50%: light |"]


def test_a_target_is_kept_on_its_own_side():
    below = {"name": "x", "found": 1.4, "limit": 1.5}
    assert Target(**below, at_most=True).met
    assert not Target(**below, at_most=False).met
    assert Target(**below, at_most=False).row == "| x | 1.4 | ≥ 1.5 | **not met**, by 7% |"
    assert Target(name="x", found=1234.5, limit=1234.5, at_most=False).row == "| x | 1234 | ≥ 1234 | met |"


def test_of_several_measurements_the_median_counts_and_quartiles_are_shown():
    spread = Spread.of([1.0, 1.2, 1.4, 9.0])
    target = Target(name="x", found=spread, limit=1.3, at_most=True, unit=" s", bound="heat")
    assert target.met
    assert target.row == "| x | 1.3 s (1.15-3.3) | ≤ 1.3 s | met |"
    assert Target(name="x", found=spread, limit=1.25, at_most=True).verdict == "**not met**, by 4%"


def test_results_say_which_commits_they_come_from(tmp_path, monkeypatch):
    machine = {"processor": "P", "instruction_sets": ["avx2"], "usable_cores": 2, "onnxruntime": "1.2"}
    monkeypatch.setattr(provenance, "describe_machine", lambda: {**machine, "commit": "a"})
    content = provenance.recorded({"cells": {"x": 1}})
    for commit in ("b", "b"):
        monkeypatch.setattr(provenance, "describe_machine", lambda commit=commit: {**machine, "commit": commit})
        provenance.recorded(content)
    assert provenance.sentence(content).startswith("Measured on P with avx2, 2 cores, onnxruntime 1.2, commits a, b, 2")
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert provenance.resumed(tmp_path / "results.json", {"cells": {}, "more": 2}) == {**content, "more": 2}
    assert provenance.resumed(tmp_path / "none.json", {"cells": {}}) == {"cells": {}}
    monkeypatch.setattr(provenance, "describe_machine", lambda: {"processor": "Q"})
    with pytest.raises(ValueError, match="measured on P, this is Q"):
        provenance.resumed(tmp_path / "results.json", {})


def test_every_results_file_has_its_table():
    names = {file.stem for file in (FOLDER / "results").glob("*.json")}
    assert names == tables.TITLES.keys() - {tables.TARGETS}
    assert all(tables._module(name).table.__doc__ for name in names)
