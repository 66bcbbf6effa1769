"""Recipes: which weights get which format; options are checked on construction."""

import itertools
from pathlib import Path

import pytest

from u2moe.quantize import FORMATS, RECIPES, Recipe, recipe
from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.weight_formats import WEIGHT_FORMATS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("fields", "message"), [
    ({"groups": {"routers": "int8"}}, r"routers.*always fp32"),
    ({"groups": {"embeddings": "int3"}}, r"embeddings must be one of fp32, int8, int4.*, got 'int3'"),
    ({"groups": {"attention": "fp32"}}, "quantizes nothing"),
    ({"groups": {"experts": "int4"}, "block_size": 20}, "block_size"),
    ({"groups": {"experts": "int4"}, "whole": "fp16"}, "groups applies only to weights in int8 and int4"),
    ({"whole": "fp16", "calibration": (Path("a.wav"),)},
     "calibration applies only to weights in int8 and int4.*, but this recipe uses fp16"),
    ({"groups": {"experts": "int4"}, "exceptions": {"ctc": "int3"}}, "exceptions: ctc must be one of fp32, fp16"),
])  # fmt: skip
def test_recipes_are_checked_at_birth(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(name="x", **fields)


def test_recipes_may_be_changed_for_groups_which_get_the_formats_that_name_them():
    for name, message in (("int7", "recipe must be one of"), ("fp32", "'fp32' quantizes nothing")):
        with pytest.raises(ValueError, match=message):
            recipe(name)
    assert recipe("fp32", {"experts": "int4"}).quantized == {"experts": "int4"}
    assert recipe("int8") is RECIPES["int8"]
    changed = recipe("int8", {"attention": "fp32"})
    assert (changed.name, "attention" in changed.quantized) == ("int8[attention=fp32]", False)
    assert FORMATS.keys() <= set(contract.WEIGHT_GROUPS)
    for kind, group in itertools.product(WEIGHT_FORMATS, FORMATS):
        assert (kind in FORMATS[group]) == (group in WEIGHT_FORMATS[kind].groups), (kind, group)
        layer = Recipe(name="x", groups={"experts": "int8"}, exceptions={"layer": kind})
        assert layer.format_of("layer", group) == (kind if kind in FORMATS[group] else "fp32")
