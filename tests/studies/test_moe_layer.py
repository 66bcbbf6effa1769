"""The study of one mixture of experts and its bound."""

import json

import numpy as np
import pytest

from u2moe.benchmarks.studies import moe_layer
from u2moe.benchmarks.studies.moe_layer import BITS, FLOAT, INT4, INT8, NUM_BYTES, Layers, targets, values

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, size in {"DIM": 32, "HIDDEN": 64, "NUM_EXPERTS": 4, "CALL_S": 0.001}.items():
        monkeypatch.setattr(moe_layer, name, size)


def test_layers_have_the_bytes_that_were_asked_for():
    for name, bits in BITS.items():
        own = Layers(name, 20_000)
        weights = 2 * 32 * 64 * bits / 8
        assert weights < own.bytes_per_expert < 2 * weights
        assert len(own.gates) * 4 * weights >= 20_000
        assert own.touched(np.random.default_rng(0).standard_normal((1, 32), np.float32)) == 2
        assert own.touched(np.random.default_rng(0).standard_normal((500, 32), np.float32)) == 4


def test_everything_is_measured(tmp_path, monkeypatch, capsys):
    measure = moe_layer.measure
    monkeypatch.setattr(moe_layer, "measure", lambda: measure((1, 16), 20_000, 1))
    file = tmp_path / "moe_layer.json"
    file.write_text(json.dumps({"machines": {"another": {}}}))
    moe_layer.main(["--results", str(file)])
    machines = json.loads(file.read_text())["machines"]
    assert machines.pop("another") == {}
    (content,) = machines.values()
    assert [(item["recipe"], item["tokens"]) for item in content["layers"]] == [
        (name, count) for name in BITS for count in (1, 16)
    ]
    assert all(item["least_s"] == max(item["read_s"], item["arithmetic_s"]) for item in content["layers"])
    assert capsys.readouterr().out.strip() == values({"machines": machines})["tables"]


def made_up(tokens):
    rate = {"median": 2e9, "low": 1e9, "high": 3e9, "count": 3}
    products = {"operator": "x", "sizes": {"1 x 1 x 1": rate}, "best": "1 x 1 x 1"}
    items = []
    for name, seconds in ((INT8, 0.003), (INT4, 0.0021)):
        spread = {"median": seconds, "low": seconds / 2, "high": 2 * seconds, "count": 3}
        items.append({"recipe": name, "tokens": tokens, "experts": 7.5, "seconds": spread, "native_s": spread,
                      "read_s": 0.001, "arithmetic_s": 0.002, "least_s": 0.002})  # fmt: skip
    machine = {"processor": "P", "commit": "c", "usable_cores": 2, "onnxruntime": "1"}
    rates = {
        "multiply_adds_per_s": {"integer": products, "float": products},
        "read_bytes_per_s": {str(NUM_BYTES): rate},
    }
    content = {"machine": machine, "date": "2026-01-01", "kernels": {"isa": "avx2"}, "rates": rates, "layers": items}
    return {"machines": {"P": content}}


def test_targets_compare_int4_with_int8_and_rows_have_milliseconds():
    (target,) = targets(made_up(16))
    assert (target.value, target.where, target.met) == (pytest.approx(0.7), "P", True)
    assert [target.limit for count in (250, 64) for target in targets(made_up(count))] == [1.05]
    found = values(made_up(250))
    assert (found["ratio_at_250"], found["native_at_250"]) == ("1.50", "1.50")
    shown = " | ".join(["3.00 (1.50-6.00)"] * 2)
    assert found["tables"].splitlines()[-2] == f"| int8 | 250 | 7.5 | {shown} | 1.00 | 2.00 | 1.50 | 1.50 |"
    assert FLOAT not in found["tables"]
