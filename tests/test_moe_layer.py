import json

import numpy as np
import pytest

from u2moe.benchmarks.studies.moe_layer import (
    BITS,
    FLOAT,
    INT8,
    LAYER_BYTES,
    Layer,
    Layers,
    main,
    merged,
    targets,
    values,
)
from u2moe.quantize.arithmetic import relative_error

pytestmark = pytest.mark.slow

SMALL = Layer(dim=32, hidden=48, num_experts=4, top_k=2)
LIMITS = {"int8": 0.03, "int4-experts": 0.2}
"""Relative errors of one layer: integers round weights and activations to 1/127, or weights to 1/7, of the largest."""


def tokens(count, dim=SMALL.dim):
    return np.random.default_rng(0).standard_normal((count, dim), np.float32)


@pytest.fixture(scope="module")
def layers():
    return {recipe: Layers(SMALL, recipe, 20_000) for recipe in BITS}


@pytest.mark.parametrize("recipe", sorted(LIMITS))
def test_all_recipes_compute_the_same_layers(layers, recipe):
    x = tokens(40)
    # there are as many layers as it takes bytes, the first of them alike
    for expected, found in zip(layers[FLOAT].run(x), layers[recipe].run(x), strict=False):
        assert relative_error(expected, found) < LIMITS[recipe]


def test_layers_differ_and_together_have_the_bytes_that_were_asked_for(layers):
    first, second = layers[INT8].run(tokens(3))[:2]
    assert relative_error(first, second) > 0.5
    for recipe, own in layers.items():
        weights = SMALL.multiply_adds * BITS[recipe] / 8
        assert weights < own.bytes_per_expert < 2 * weights
        assert len(own.gates) * SMALL.num_experts * weights >= 20_000


@pytest.mark.parametrize("recipe", sorted(BITS))
def test_products_alone_are_those_of_all_experts(layers, recipe):
    """They are as many as experts have weights, and those of the first expert are its first product."""
    own = layers[recipe]
    names = [output.name for output in own.products.get_outputs()]
    assert len(names) == len(own.gates) * SMALL.num_experts * 2
    floats = recipe != INT8
    x = tokens(5) if floats else np.full((5, SMALL.dim), 129, np.uint8)
    inner = tokens(5, SMALL.hidden) if floats else np.full((5, SMALL.hidden), 129, np.uint8)
    found = own.products.run(names[:2], {"tokens": x, "inner": inner})
    reference = layers[FLOAT].products.run(
        names[:2] if recipe == FLOAT else [output.name for output in layers[FLOAT].products.get_outputs()][:2],
        {"tokens": x.astype(np.float32) if floats else np.ones_like(x, np.float32),
         "inner": inner.astype(np.float32) if floats else np.ones_like(inner, np.float32)},
    )  # fmt: skip
    assert [array.shape for array in found] == [(5, SMALL.hidden), (5, SMALL.dim)]
    for expected, product in zip(reference, found, strict=True):
        assert relative_error(expected, product) < 0.2


def test_experts_without_tokens_are_not_counted(layers):
    assert layers[INT8].touched(tokens(1)) == SMALL.top_k
    assert layers[INT8].touched(tokens(500)) == SMALL.num_experts


def test_the_command_writes_what_the_table_shows(tmp_path, capsys):
    file = tmp_path / "moe_layer.json"
    sizes = ["--dim", "32", "--hidden", "48", "--num-experts", "4"]
    options = ["--tokens", "1", "16", "--repetitions", "2", "--bytes", "200000"]
    main(["--results", str(file), "--recipes", "int8", "fp32", *options, *sizes])
    content = json.loads(file.read_text())
    assert capsys.readouterr().out.strip() == values(content)["tables"]
    ((where, results),) = content["machines"].items()
    assert [(item["recipe"], item["tokens"]) for item in results["layers"]] == [
        ("int8", 1), ("fp32", 1), ("int8", 16), ("fp32", 16),
    ]  # fmt: skip
    for item in results["layers"]:
        assert item["least_s"] == max(item["read_s"], item["arithmetic_s"])
        assert item["ratio"] == pytest.approx(item["seconds"]["median"] / item["least_s"])
        assert item["products_s"]["median"] > 0
    expected = [f"{where}: MoE layer at 16 tokens / its memory-read bound"]
    if results["kernels"]["native"]:
        expected.append(f"{where}: native MoE layer at 16 tokens / reading its weights")
        assert [("native_s" in item) for item in results["layers"]] == [True, False, True, False]
    assert [target.name for target in targets(content)] == expected
    main(["--results", str(file), "--recipes", "fp32", "--tokens", "16", *options[2:], *sizes])
    (again,) = json.loads(file.read_text())["machines"].values()
    kept = {(item["recipe"], item["tokens"]): item for item in results["layers"]}
    assert all(
        (item == kept[item["recipe"], item["tokens"]]) == (item["recipe"] == "int8") or item["tokens"] == 1
        for item in again["layers"]
    )
    assert len(again["layers"]) == 4


def on(content):
    """Results of one machine."""
    return {"machines": {"": content}}


def made_up(seconds, tokens_per_call, recipe="int8", model="1"):
    spread = {"median": seconds, "low": seconds / 2, "high": 2 * seconds, "count": 3}
    rate = {"median": 2e9, "low": 1e9, "high": 3e9, "count": 3}
    products = {"operator": "x", "sizes": {"1 x 1 x 1": rate}, "best": "1 x 1 x 1"}
    item = {"recipe": recipe, "tokens": tokens_per_call, "experts": 7.5, "seconds": spread, "products_s": spread,
            "read_s": 0.001, "arithmetic_s": 0.002, "least_s": 0.002, "ratio": seconds / 0.002}  # fmt: skip
    machine = {"processor": "P", "processor_version": f"cpu family 7, model {model}, stepping 3", "commit": "c",
               "instruction_sets": ["avx2"], "usable_cores": 2, "onnxruntime": "1"}  # fmt: skip
    return {
        "sizes": SMALL.__dict__, "threads": 1, "machine": machine, "date": "2026-01-01", "kernels": {"isa": "avx2"},
        "rates": {"multiply_adds_per_s": {"integer": products, "float": products},
                  "read_bytes_per_s": {str(LAYER_BYTES): rate}},
        "layers": [item],
    }  # fmt: skip


def test_targets_are_the_bounds_that_were_set():
    (at_16,) = targets(on(made_up(0.0011, 16)))
    assert at_16.value == pytest.approx(1.1)
    assert at_16.met
    (at_250,) = targets(on(made_up(0.003, 250)))
    assert at_250.value == pytest.approx(1.5)
    assert not at_250.met
    assert targets(on(made_up(0.003, 64))) == targets(on(made_up(0.003, 250, "fp32"))) == []
    assert targets(on({**made_up(0.003, 250), "threads": 2})) == []


def test_a_row_has_milliseconds():
    found = values(on(made_up(0.003, 250)))
    assert (found["ratio_at_250"], found["products_at_250"]) == ("1.50", "1.50")
    row = found["tables"].splitlines()[-1]
    assert row == "| int8 | 250 | 7.5 | 3.00 (1.50-6.00) | 3.00 (1.50-6.00) |  | 1.00 | 2.00 | 1.50 |  |"


def test_native_layers_have_limits_of_their_own():
    def native(seconds, tokens_per_call, isa):
        results = made_up(0.003, tokens_per_call)
        results["layers"][0]["native_s"] = {**results["layers"][0]["seconds"], "median": seconds}
        return targets(on({**results, "kernels": {"isa": isa}}))[1]

    assert (native(0.0012, 16, "avx2").value, native(0.0012, 16, "amx").limit) == (pytest.approx(1.2), 1.25)
    assert native(0.0029, 250, "avx2").met
    assert not native(0.0029, 250, "amx").met


def test_a_run_keeps_what_it_did_not_measure():
    """Other recipes and numbers of tokens of this machine, and machines of the same name but of another model."""
    first = merged({}, {**made_up(0.003, 250), "layers": [made_up(0.1, count)["layers"][0] for count in (16, 250)]})
    other = merged(first, made_up(0.002, 16, model="2"))
    assert list(other["machines"]) == [f"P (cpu family 7, model {model}), avx2" for model in (1, 2)]
    again = merged(other, made_up(0.001, 16, "fp32"))
    assert next(iter(again["machines"].values())) == other["machines"]["P (cpu family 7, model 2), avx2"]
    again = merged(again, made_up(0.005, 16))
    layers = list(again["machines"].values())[-1]["layers"]
    assert [(item["recipe"], item["tokens"]) for item in layers] == [("fp32", 16), ("int8", 16), ("int8", 250)]
    assert [item["seconds"]["median"] for item in layers] == [0.001, 0.005, 0.1]
    assert values(again)["tables"].count("###") == 2
    changed = merged(again, {**made_up(0.001, 16), "threads": 2})
    assert len(list(changed["machines"].values())[-1]["layers"]) == 1
