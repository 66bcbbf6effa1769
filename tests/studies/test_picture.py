"""The picture at the top of the README shows the measured values."""

import re
from pathlib import Path

import pytest

from u2moe.benchmarks.results import picture
from u2moe.benchmarks.results.files import read_json, results_file
from u2moe.benchmarks.studies import full_size, systems

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(autouse=True)
def clone(monkeypatch):
    monkeypatch.chdir(README.parent)


@pytest.mark.parametrize("mode", picture.PANELS)
def test_the_bars_are_the_factors_of_the_results_pages(mode):
    bars = picture.bars(mode)
    assert {by for _, _, by in bars} == picture.COLOURS.keys()
    factors = {(label, by): factor.median for label, factor, by in bars}
    assert len(factors) == len(bars)
    alone = [factors[f"{name}, int8", picture.ALONE] for name in ("Dense-225M", "MoE-1B", "Dense-1B")]
    assert alone == sorted(alone)
    pages = {"full_size": (full_size, "tables"), "systems": (systems, "same_weights")}
    text = "".join(page.values(read_json(results_file(name)))[key] for name, (page, key) in pages.items())
    for (label, _), value in factors.items():
        assert "torch" in label or f"{value:.3f} (" in text


@pytest.mark.slow
def test_the_picture_is_drawn_and_shown(tmp_path):
    picture.draw(tmp_path / "images" / "speed.png")
    assert (tmp_path / "images" / "speed.png").read_bytes().startswith(b"\x89PNG")
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README.read_text(encoding="utf-8"))
    assert picture.PICTURE.as_posix() == shown[0]
    assert all((README.parent / file).is_file() for file in shown)
