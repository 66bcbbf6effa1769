"""Pairs of int8 weights leave room for any activations in 16 bits: all weights of bundles, by arithmetic."""

import onnx_ir as ir
import pytest

from u2moe.runtime import Bundle
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.graph.file import group_of

pytestmark = pytest.mark.slow


def factors(model):
    """The int8 weights of a graph that are multiplied with activations, by name."""
    integers = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8]
    return {value.name: value.const_value.numpy() for value in integers if group_of(value) != "embeddings"}


def assert_all_fit(folder, fits_16_bits, num_weights):
    weights = {}
    for file in sorted(folder.glob("*.onnx")):
        model = ir.load(file)
        weights |= {f"{file.name}: {name}": array for name, array in factors(model).items()}
    assert len(weights) == num_weights
    assert [name for name, array in weights.items() if not fits_16_bits(array)] == []


def num_factors(bundle):
    counts = bundle.manifest.quantization["num_weights"]
    return sum(count for group, count in counts.items() if group != "embeddings")


def test_every_weight_of_the_demo_model_leaves_room(fits_16_bits):
    demo = Bundle.open(DEMO_FOLDER)
    assert num_factors(demo) > 250
    assert_all_fit(demo.path, fits_16_bits, num_factors(demo))


@pytest.mark.parametrize("name", ["int8", "int8-experts", "int4-experts"])
def test_every_weight_of_a_recipe_leaves_room(name, quantized, fits_16_bits):
    bundle = quantized(name)
    others = bundle.manifest.quantization["num_weights"]["experts"] if name == "int4-experts" else 0
    assert_all_fit(bundle.path, fits_16_bits, num_factors(bundle) - others)
