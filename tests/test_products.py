"""Products of other libraries beside ours: every engine gives a time, and the table has a row for each."""

import json
import shutil

import pytest

pytest.importorskip("torch")

from u2moe.benchmarks.full_size.moe_layer import Layer
from u2moe.benchmarks.peers import products

SMALL = Layer(dim=64, hidden=96, num_experts=4, top_k=2)


@pytest.mark.slow
def test_all_engines_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(products, "CALL_S", 0.0)
    found = products.measure(SMALL, (1, 8), num_bytes=1, repetitions=1)
    engines = {cell["engine"] for cell in found["cells"]}
    expected = {f"onnxruntime, {kind}" for kind in ("int8", "int4-experts", "QMoE, int8", "QMoE, int4")}
    expected |= {f"torch, int{bits}, products" for bits in (4, 8)}
    if products.built_onednn(tmp_path):
        expected.add("oneDNN, int8, products")
    assert engines >= expected
    assert all(cell["seconds"]["median"] > 0 for cell in found["cells"])
    table = products.values(json.loads(json.dumps(found)))["table"]
    assert "| ms of a layer | 1 tokens | 8 tokens |" in table
    assert len(table.splitlines()) == 2 + len(engines)


def test_onednn_is_left_out_where_it_cannot_be_built(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert products.built_onednn(tmp_path) is None
