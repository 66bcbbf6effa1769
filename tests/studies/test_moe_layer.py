"""The study of one mixture of experts and its bound."""

import json

import numpy as np
import pytest

from u2moe.benchmarks.studies import moe_layer
from u2moe.benchmarks.studies.moe_layer import BITS, FLOAT, INT4, INT8, NUM_BYTES, Layers, Shape, targets, values

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shapes = {"PAPER": Shape(4, 2, 64), "NARROW": (Shape(8, 2, 32),)}
    for name, size in {"DIM": 32, "CALL_S": 0.001, **shapes}.items():
        monkeypatch.setattr(moe_layer, name, size)


def test_layers_have_the_bytes_that_were_asked_for():
    for name, bits in BITS.items():
        own = Layers(name, 20_000, moe_layer.PAPER)
        weights = 2 * 32 * 64 * bits / 8
        assert weights < own.bytes_per_expert < 2 * weights
        assert len(own.gates) * 4 * weights >= 20_000
        assert own.touched(np.random.default_rng(0).standard_normal((1, 32), np.float32)) == 2
        assert own.touched(np.random.default_rng(0).standard_normal((500, 32), np.float32)) == 4


def test_everything_is_measured(tmp_path, monkeypatch, capsys):
    measure = moe_layer.measure
    monkeypatch.setattr(moe_layer, "measure", lambda tokens=(1, 16), **own: measure(tokens, 20_000, 1, **own))
    file = tmp_path / "moe_layer.json"
    file.write_text(json.dumps({"machines": {"another": {}}}))
    moe_layer.main(["--results", str(file), "--narrow"])
    narrow = json.loads(file.read_text())["machines"]
    capsys.readouterr()
    moe_layer.main(["--results", str(file)])
    machines = json.loads(file.read_text())["machines"]
    assert machines.pop("another") == {}
    (content,) = machines.values()
    found = [(item["recipe"], item["tokens"]) for item in content["layers"]]
    assert found == [(name, count) for name in BITS for count in (1, 16)]
    assert content["narrow"] in [own.get("narrow") for own in narrow.values()]  # kept
    found = [(item["recipe"], item["tokens"], item["shape"]) for item in content["narrow"]["layers"]]
    assert found == [(name, 16, shape) for name in (INT8, INT4) for shape in ([4, 2, 64], [8, 2, 32])]
    assert all(item["least_s"] == max(item["read_s"], item["arithmetic_s"]) for item in content["layers"])
    assert capsys.readouterr().out.strip() == values({"machines": machines})["tables"]


def made_up(tokens):
    rate = {"median": 2e9, "low": 1e9, "high": 3e9, "count": 3}
    products = {"operator": "x", "sizes": {"1 x 1 x 1": rate}, "best": "1 x 1 x 1"}
    items = []
    for name, seconds in ((INT8, 0.003), (INT4, 0.0021)):
        spread = {"median": seconds, "low": seconds / 2, "high": 2 * seconds, "count": 3}
        items.append({"recipe": name, "shape": [4, 2, 64], "tokens": tokens, "experts": 7.5, "seconds": spread,
                      "native_s": spread, "read_s": 0.001, "arithmetic_s": 0.002, "least_s": 0.002})  # fmt: skip
    machine = {"processor": "P", "commit": "c", "usable_cores": 2, "onnxruntime": "1"}
    rates = {
        "multiply_adds_per_s": {"integer": products, "float": products},
        "read_bytes_per_s": {str(NUM_BYTES): rate},
    }
    content = {"machine": machine, "date": "2026-01-01", "kernels": {"isa": "avx2"}, "rates": rates, "layers": items}
    return {"machines": {"P": content}}


def test_targets_compare_int4_with_int8_and_rates_are_of_bytes_and_products():
    (target,) = targets(made_up(16))
    assert (target.value, target.where, target.met) == (pytest.approx(0.7), "P", True)
    assert [target.limit for count in (250, 64) for target in targets(made_up(count))] == [1.03]
    found = values(made_up(250))
    assert (found["ratio_at_250"], found["native_at_250"]) == ("1.50", "1.50")
    shown = " | ".join(["3.00 (1.50-6.00)"] * 2)
    assert found["tables"].splitlines()[-2] == f"| int8 | 250 | 7.5 | {shown} | 1.00 | 2.00 | 1.50 | 1.50 |"
    assert FLOAT not in found["tables"]
    results = made_up(16)
    (content,) = results["machines"].values()
    wide = content["layers"][0]
    narrow = {"shape": [8, 2, 32], "experts": 14.0, "native_s": {**wide["native_s"], "median": 0.0025},
              "read_s": 0.0009, "arithmetic_s": 0.001, "least_s": 0.001}  # fmt: skip
    content["narrow"] = content | {"layers": [wide, wide | narrow]}
    *_, target = targets(results)
    assert (target.value, target.limit, target.met) == (pytest.approx(0.9 * 3 / 2.5), 0.9, True)
    shown = values(results)["tables"].splitlines()[-1]
    assert shown == "| int8 | 8x2x32 | 14.0 | 2.50 | 3.00 | 1.08 | 0.60 | 1.00 |"
