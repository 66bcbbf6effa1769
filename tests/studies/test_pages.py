import json
from pathlib import Path
from types import FunctionType

import pytest

from u2moe.benchmarks.instruments.statistics import Spread
from u2moe.benchmarks.results import files as provenance
from u2moe.benchmarks.results import pages
from u2moe.benchmarks.results.files import repository
from u2moe.benchmarks.results.markdown import Target, filled, names
from u2moe.benchmarks.studies.shared.script import script

ROOT = Path(__file__).parents[2]
MACHINE = {"processor": "P", "usable_cores": 2, "onnxruntime": "1.2"}


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """Make a folder with results and pages, and modules with few values."""

    class Module:
        def __init__(self, name):
            self.name = name

        def values(self, results):
            return {"table": f"| {self.name} {results['x']} |", "x": str(results["x"])}

    class WithTargets(Module):
        def targets(self, results):
            return iter([Target(name=self.name, found=results["x"], limit=2, at_most=True, unit=" s")])

    monkeypatch.setattr(pages, "_module", lambda name: Module(name) if name == "hotwords" else WithTargets(name))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    for name, x in (("full_size", 1), ("moe_layer", 3), ("hotwords", 2)):
        content = {"x": x, "machine": {**MACHINE, "commit": "c"}, "date": "2026-01-01"}
        (tmp_path / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_the_pages_say_what_the_results_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert pages.main(["--check"]) == 0


def test_every_result_is_of_a_study_and_on_a_page_between_its_marks():
    results = {file.stem for file in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert results <= set(pages.study_names())
    shown = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    assert not [name for name in results if f"<!-- begin {name}." not in shown]
    text = "# A\n\n<!-- begin a -->\nold \\1\n<!-- end a -->\n\nIt is <!-- begin b -->1<!-- end b --> kept.\n"
    once = filled(text, {"a": "| new \\1 |\n", "b": "2"})
    assert once == (
        "# A\n\n<!-- begin a -->\n| new \\1 |\n<!-- end a -->\n\nIt is <!-- begin b -->2<!-- end b --> kept.\n"
    )
    assert filled(once, {"a": "| new \\1 |", "b": "2"}) == once
    assert filled(text, {}) == text


@pytest.mark.parametrize("rest", ["kept", "<!-- end b -->", "<!-- begin b -->1<!-- end b -->"])
def test_a_mark_without_its_end_would_swallow_the_rest(rest):
    with pytest.raises(ValueError, match=r"a\.md: <!-- begin a --> without <!-- end a -->"):
        names(f"<!-- begin a -->\n\n{rest}\n", "a.md")


def test_pages_show_values_of_results_by_their_names(clone, capsys):
    own = clone / "docs" / "results" / "speed.md"
    own.write_text(
        " ".join(
            f"<!-- begin {key} --><!-- end {key} -->" for key in ("full_size.x", "full_size.measured", "serving.x")
        )
    )
    assert pages.main(["--check"]) == 1
    assert capsys.readouterr().out.count("outdated") == 1
    assert pages.main([]) == 0
    text = own.read_text()
    assert text.startswith("<!-- begin full_size.x -->1<!-- end full_size.x --> ")
    assert "Measured on P, 2 cores" in text
    assert "<!-- begin serving.x -->(not measured)<!--" in text
    assert pages.main(["--check"]) == 0
    own.write_text("<!-- begin full_size.y -->0<!-- end full_size.y -->")
    with pytest.raises(ValueError, match=r"speed\.md: unknown marks: full_size\.y"):
        pages.main([])


def test_targets_of_all_results_are_kept_on_their_own_side_by_the_median(clone):
    found = pages.all_values(clone / "benchmarks" / "results")
    assert (found["targets"]["met"], found["targets"]["total"]) == ("1", "2")
    rows = found["targets"]["table"].splitlines()[2:]
    assert rows == ["| full_size |  | 1 s | ≤ 2 s | met |", "| moe_layer |  | 3 s | ≤ 2 s | **missed** by 50.0% |"]
    below = {"name": "x", "found": 1.4, "limit": 1.5}
    assert Target(**below, at_most=True).met
    assert Target(**below, at_most=False).row == ("x", "", "1.4", "≥ 1.5", "**missed** by 6.7%")
    assert Target(name="x", found=1234.5, limit=1234.5, at_most=False).row == ("x", "", "1234", "≥ 1234", "met")
    spread = Spread.of([1.0, 1.2, 1.4, 9.0])
    assert Target(name="x", found=spread, limit=1.3, at_most=True, unit=" s").row == (
        "x", "", "1.3 s (1.15-3.3)", "≤ 1.3 s", "met",
    )  # fmt: skip
    assert Target(name="x", found=spread, limit=1.25, at_most=True).row[-1] == "**missed** by 4.0%"


def test_results_say_which_commits_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "describe_machine", lambda: {**MACHINE, "commit": "a"})
    content, file = {"cells": {"x": 1}}, tmp_path / "results.json"
    provenance.record(file, content)
    for commit in ("b", "b"):
        monkeypatch.setattr(provenance, "describe_machine", lambda commit=commit: {**MACHINE, "commit": commit})
        provenance.record(file, content)
    assert provenance.measured(content).startswith(
        "Measured on P, 2 cores, onnxruntime 1.2, commit b and 1 before it, 2"
    )
    assert provenance.resumed(file, {"cells": {}, "more": 2}) == {**content, "more": 2}
    assert provenance.resumed(tmp_path / "none.json", {"cells": {}}) == {"cells": {}}


def test_machines_of_one_name_are_told_apart_by_family_and_model(tmp_path, monkeypatch):
    def machine(version):
        return {**MACHINE, "processor_version": version}

    older, newer = "cpu family 25, model 17, stepping 1", "cpu family 26, model 2, stepping 1"
    (tmp_path / "results.json").write_text(json.dumps({"machine": machine(older), "cells": {}}))
    monkeypatch.setattr(provenance, "describe_machine", lambda: machine(older.replace("stepping 1", "stepping 2")))
    provenance.resumed(tmp_path / "results.json", {})
    monkeypatch.setattr(provenance, "describe_machine", lambda: machine(newer))
    with pytest.raises(
        ValueError, match=r"measured on P \(cpu family 25, model 17\), but this machine is P \(cpu family 26, model 2\)"
    ):
        provenance.resumed(tmp_path / "results.json", {})
    kernels = {"isa": "avx2"}
    assert provenance.machine_key({"machine": machine(newer), "kernels": kernels}) == "P (cpu family 26, model 2), avx2"


def test_scripts_say_in_one_line_that_they_need_a_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        repository()
    main = FunctionType(repository.__code__, {**vars(provenance), "__name__": "__main__"})
    with pytest.raises(SystemExit, match=r"^error: run this in the root of a u2moe clone, not in .*, or name"):
        script(main)
    assert script(repository) is repository  # imported, not run
