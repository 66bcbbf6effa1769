"""Numbers, targets and pictures on pages are those of the results."""

import json
import re
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest

from u2moe.benchmarks.results import files as provenance
from u2moe.benchmarks.results import pages, picture
from u2moe.benchmarks.results.files import read_json, repository, results_file
from u2moe.benchmarks.results.markdown import Target, filled, names
from u2moe.benchmarks.studies import full_size, systems
from u2moe.benchmarks.studies.shared.script import script

ROOT = Path(__file__).parents[2]
MACHINE = {"processor": "P", "usable_cores": 2, "onnxruntime": "1.2"}


def test_the_pages_say_what_the_results_say_and_show_all_between_their_marks(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert pages.main(["--check"]) == 0
    results = {file.stem for file in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert results <= set(pages.study_names())
    shown = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    assert not [name for name in results if f"<!-- begin {name}." not in shown]
    text = "# A\n\n<!-- begin a -->\nold \\1\n<!-- end a -->\n\nIt is <!-- begin b -->1<!-- end b --> kept.\n"
    once = filled(text, {"a": "| new \\1 |\n", "b": "2"})
    assert once == text.replace("old \\1", "| new \\1 |").replace(">1<", ">2<")
    assert filled(once, {"a": "| new \\1 |", "b": "2"}) == once
    assert filled(text, {}) == text
    for rest in ("kept", "<!-- end b -->", "<!-- begin b -->1<!-- end b -->"):  # which a mark without an end swallows
        with pytest.raises(ValueError, match=r"a\.md: <!-- begin a --> without <!-- end a -->"):
            names(f"<!-- begin a -->\n\n{rest}\n", "a.md")


def test_pages_show_values_of_results_by_their_names_and_count_their_targets(tmp_path, monkeypatch, capsys):
    def module(name):
        def values(results):
            return {"table": f"| {name} {results['x']} |", "x": str(results["x"])}

        def targets(results):
            yield Target(name=name, found=results["x"], limit=2, at_most=True, unit=" s")

        return SimpleNamespace(values=values, **({} if name == "hotwords" else {"targets": targets}))

    monkeypatch.setattr(pages, "_module", module)
    monkeypatch.chdir(tmp_path)
    own, folder = tmp_path / "docs" / "results" / "speed.md", tmp_path / "benchmarks" / "results"
    own.parent.mkdir(parents=True)
    folder.mkdir(parents=True)
    for name, x in (("full_size", 1), ("moe_layer", 3), ("hotwords", 2)):
        content = {"x": x, "machine": {**MACHINE, "commit": "c"}, "date": "2026-01-01"}
        (folder / f"{name}.json").write_text(json.dumps(content))
    keys = ("full_size.x", "full_size.measured", "serving.x")
    own.write_text(" ".join(f"<!-- begin {key} --><!-- end {key} -->" for key in keys))
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
    found = pages.all_values(folder)
    assert (found["targets"]["met"], found["targets"]["total"]) == ("1", "2")
    rows = found["targets"]["table"].splitlines()[2:]
    assert rows == ["| full_size |  | 1 s | ≤ 2 s | met |", "| moe_layer |  | 3 s | ≤ 2 s | **missed** by 50.0% |"]
    large = Target(name="x", found=1234.5, limit=1234.5, at_most=False)
    assert large.row == ("x", "", "1234", "≥ 1234", "met")


def test_results_say_which_commits_and_machines_they_come_from(tmp_path, monkeypatch):
    content, file = {"cells": {"x": 1}}, tmp_path / "results.json"
    for commit in ("a", "b", "b"):
        monkeypatch.setattr(provenance, "describe_machine", lambda commit=commit: {**MACHINE, "commit": commit})
        provenance.record(file, content)
    text = "Measured on P, 2 cores, onnxruntime 1.2, commit b and 1 before it, 2"
    assert provenance.measured(content).startswith(text)
    assert provenance.resumed(file, {"cells": {}, "more": 2}) == {**content, "more": 2}
    assert provenance.resumed(tmp_path / "none.json", {"cells": {}}) == {"cells": {}}
    versions = ("25, model 17, stepping 1", "25, model 17, stepping 2", "26, model 2, stepping 1")
    older, restepped, newer = ({**MACHINE, "processor_version": f"cpu family {version}"} for version in versions)
    file.write_text(json.dumps({"machine": older, "cells": {}}))
    monkeypatch.setattr(provenance, "describe_machine", lambda: restepped)
    provenance.resumed(file, {})
    monkeypatch.setattr(provenance, "describe_machine", lambda: newer)
    both = r"measured on P \(cpu family 25, model 17\), but this machine is P \(cpu family 26, model 2\)"
    with pytest.raises(ValueError, match=both):
        provenance.resumed(file, {})
    content = {"machine": newer, "kernels": {"isa": "avx2"}}
    assert provenance.machine_key(content) == "P (cpu family 26, model 2), avx2"


def test_scripts_say_in_one_line_that_they_need_a_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        repository()
    main = FunctionType(repository.__code__, {**vars(provenance), "__name__": "__main__"})
    with pytest.raises(SystemExit, match=r"^error: run this in the root of a u2moe clone, not in .*, or name"):
        script(main)
    assert script(repository) is repository  # imported, not run


@pytest.mark.parametrize("mode", picture.PANELS)
def test_the_bars_of_the_readmes_picture_are_the_factors_of_the_results_pages(mode, monkeypatch):
    monkeypatch.chdir(ROOT)
    bars = picture.bars(mode)
    assert {by for _, _, by in bars} == picture.COLOURS.keys()
    factors = {(label, by): factor.median for label, factor, by in bars}
    assert len(factors) == len(bars)
    alone = [factors[f"{name}, int8", picture.ALONE] for name in ("Dense-225M", "MoE-1B", "Dense-1B")]
    assert alone == sorted(alone)
    text = full_size.values(read_json(results_file("full_size")))["tables"]
    text += systems.values(read_json(results_file("systems")))["same_weights"]
    for (label, _), value in factors.items():
        assert "torch" in label or f"{value:.3f} (" in text


@pytest.mark.slow
def test_the_picture_is_drawn_and_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    picture.draw(tmp_path / "images" / "speed.png")
    assert (tmp_path / "images" / "speed.png").read_bytes().startswith(b"\x89PNG")
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", Path("README.md").read_text(encoding="utf-8"))
    assert picture.PICTURE.as_posix() == shown[0]
    assert all(Path(file).is_file() for file in shown)
