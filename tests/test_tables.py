import json
from pathlib import Path

import pytest

from u2moe.benchmarks import tables
from u2moe.benchmarks.tables import main, updated

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


@pytest.mark.parametrize("name", ["full_size"])
def test_the_command_writes_once_and_check_notices_a_change(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tables, "_table_of", lambda name: lambda results: f"| {name} {results['x']} |")
    (tmp_path / "results").mkdir()
    results = tmp_path / "results" / f"{name}.json"
    results.write_text(json.dumps({"x": 1}))
    options = ["--folder", str(tmp_path)]
    assert main(["--check", *options]) == 1
    assert not (tmp_path / "README.md").exists()
    assert main(options) == 0
    assert "| full_size 1 |" in (tmp_path / "README.md").read_text()
    assert main(["--check", *options]) == 0
    results.write_text(json.dumps({"x": 2}))
    assert main(["--check", *options]) == 1
