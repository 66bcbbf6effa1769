"""`u2moe doctor`: one page for a report of a problem."""

import re

import pytest

from u2moe.benchmarks.bench import doctor
from u2moe.runtime import bundle_location, cli


@pytest.mark.slow
def test_the_page_says_what_a_report_needs(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_LONGEST_S", 0.0)
    assert cli.main(["doctor"]) == 0
    first, err = capsys.readouterr()
    for phrase in (
        "u2moe ", "Python ", "onnxruntime ", "CPUExecutionProvider", "processor: ", "kernels: ", "libsndfile ",
    ):  # fmt: skip
        assert phrase in first
    assert re.search(
        r"demo model [0-9a-f]{16}: tokens [0-9a-f]{16}\nRTF \d\.\d{4}, \d+ times real time, 1 thread\n$", first
    )
    assert err == ""
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == first.splitlines()[-2]  # the same tokens every time


def test_without_the_demo_model_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bundle_location, "DEMO_FOLDER", tmp_path / "none")
    assert cli.main(["doctor"]) == 1
    assert "demo model: the demo model is not installed: pip install ./runtime/demo" in capsys.readouterr().out
