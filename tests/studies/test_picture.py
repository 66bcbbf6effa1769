"""The picture at the top of the README: what it shows is what was measured."""

import re
from pathlib import Path

import pytest

from u2moe.benchmarks.results import picture
from u2moe.benchmarks.results.files import read_json, results_file
from u2moe.benchmarks.studies import full_size, sherpa

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(autouse=True)
def clone(monkeypatch):
    monkeypatch.chdir(README.parent)


@pytest.mark.parametrize("mode", picture.PANELS)
def test_the_bars_are_the_factors_of_the_results_pages(mode):
    factors = {bar.label: bar.factor.median for bar in picture.bars(mode)}
    own = {label: factor for label, factor in factors.items() if "native kernels" not in label}
    assert len(own) == 5
    assert len(factors) in (5, 8)  # native kernels, if they were measured on this machine
    assert factors["Dense-225M, u2moe int8"] < factors["MoE-1B, u2moe int8"] < factors["Dense-1B, u2moe int8"]
    pages = {"full_size": full_size, "sherpa": sherpa}
    text = "".join(page.values(read_json(results_file(name)))["table"] for name, page in pages.items())
    for label in ("Dense-225M, u2moe int8", "MoE-1B, u2moe int8", "Dense-1B, u2moe int8"):
        assert f"{factors[label]:.4f} (" in text
    assert f"{factors['Dense-225M, sherpa-onnx int8']:.4f} (" in text


def test_the_picture_is_drawn_and_shown(tmp_path):
    picture.draw(tmp_path / "images" / "speed.png")
    assert (tmp_path / "images" / "speed.png").read_bytes().startswith(b"\x89PNG")
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README.read_text(encoding="utf-8"))
    assert picture.PICTURE.as_posix() == shown[0]
    assert all((README.parent / file).is_file() for file in shown)
