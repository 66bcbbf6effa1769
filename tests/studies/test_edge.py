"""The study that compares mixtures for the edge, on invented results."""

import onnx_ir as ir
import pytest

from u2moe.benchmarks.instruments.workload import audio_seconds
from u2moe.benchmarks.results.files import measured_here
from u2moe.benchmarks.studies import edge
from u2moe.benchmarks.studies.full_size import MODES
from u2moe.benchmarks.studies.shared import random_models
from u2moe.export.random_checkpoint import PRESETS
from u2moe.quantize.layers import calls, layer_of

pytestmark = pytest.mark.slow


@pytest.fixture
def results():
    """Mixtures are as fast as Dense-225M per second of speech, except the paper's, and only in chunks."""
    seconds = {mode: {} for mode in MODES}
    starts = {}
    for case in (case for cases in edge.groups() for case in cases if case.model != edge.LARGE):
        for mode, own in seconds.items():
            times = 2.0 if case.model == edge.MIXTURE and mode == "streaming" else 1.0
            own[case.key] = [times * 0.05 * audio_seconds(mode)] * 3
        starts[case.key] = {"files": 5e8, "peak_bytes": {"median": 7e8}}
    content = {"kernels": {"isa": "x"}, "touched": {"16x2x960": 14.2}, "seconds": seconds, "starts": starts}
    return {"machines": {"made up": {**measured_here(), **content}}}


def test_networks_that_are_as_fast_are_named(results):
    shown = edge.values(results)
    assert (shown["moe-1b.streaming"], shown["16x2x960.streaming"]) == ("2.00", "1.00")
    assert shown["fast.streaming"] == "8x1x1920, 16x2x960, 32x4x480, 8x2x1920 in every second block"
    assert shown["fast.full"].startswith("8x2x1920, ")


@pytest.mark.parametrize(
    ("model", "sizes"), [("16x2x960", "1061/224 | 14.2"), ("8x2x1920 in every second block", "642/283 | ")]
)
def test_tables_hold_what_was_measured(results, model, sizes):
    rows = [line for line in edge.values(results)["tables"].splitlines() if line.startswith(f"| {model} ")]
    row = f"{sizes} | 500 | 700 | 0.050 (1.00) | 0.050 (1.00) | 0.050 (1.00) | 0.500 (1.00) | 0.100/0.100 |"
    assert rows == [f"| {model} | {row}"] * 4


def test_every_second_block_has_experts_and_the_others_a_dense_layer(tmp_path, monkeypatch):
    monkeypatch.setitem(random_models.SIZES, edge.HALF, PRESETS["tiny"])
    bundle = random_models.make_bundle(edge.HALF, "int4", tmp_path)
    found = {}
    for graph in bundle.manifest.model.graphs():
        for node in calls(ir.load(bundle.path / graph.file), "Int4FeedForward", "Int4MixtureOfExperts"):
            found.setdefault(layer_of(node).rsplit(".", 1)[0], set()).add(node.op_type.split("_")[0])
    dense, experts = {"Int4FeedForward"}, {"Int4MixtureOfExperts"}
    assert list(found.values()) == [dense, experts] * 3, found


def test_what_exists_is_neither_made_nor_measured_again(results, tmp_path, monkeypatch):
    (content,) = results["machines"].values()
    edge.record(tmp_path / edge.STATE, content | {"touched": dict.fromkeys(edge.TITLES, 1.0)})
    for model in edge.TITLES:
        for form in edge.FORMATS:
            (tmp_path / model / form).mkdir(parents=True)
    monkeypatch.setattr(edge.Bundle, "open", lambda *_, **__: None)
    measured = []
    monkeypatch.setattr(edge, "measure", lambda _, cases: (measured.append(cases), ({}, {}))[1])
    monkeypatch.setattr(edge, "TITLES", {model: title for model, title in edge.TITLES.items() if model != edge.LARGE})
    edge.main([str(tmp_path), "--results", str(tmp_path / "edge.json")])
    assert not measured
    assert (tmp_path / "edge.json").exists()
