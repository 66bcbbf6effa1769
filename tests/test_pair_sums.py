"""Pairs of int8 weights leave room for any activations in 16 bits: checked for all weights of bundles."""

import onnx_ir as ir
import pytest

from u2moe.runtime import Bundle
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.graph.file import group_of

pytestmark = pytest.mark.slow


def factors(model):
    """Return the int8 weights of a graph that are multiplied by activations, by name."""
    integers = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8]
    return {value.name: value.const_value.numpy() for value in integers if group_of(value) != "embeddings"}


def test_every_weight_of_the_demo_model_leaves_room(fits_16_bits):
    counts = Bundle.open(DEMO_FOLDER).manifest.quantization["num_weights"]
    files = DEMO_FOLDER.glob("*.onnx")
    weights = {f"{file.name}: {name}": array for file in files for name, array in factors(ir.load(file)).items()}
    assert len(weights) == sum(count for group, count in counts.items() if group != "embeddings") > 250
    assert [name for name, array in weights.items() if not fits_16_bits(array)] == []
