"""What to quantize, and how: options, checked at birth."""

import pytest

from u2moe.quantize import FORMATS, RECIPES, Recipe, recipe
from u2moe.runtime.bundle import contract

pytestmark = pytest.mark.slow


def test_recipes_are_checked_at_birth():
    with pytest.raises(ValueError, match=r"routers.*always fp32"):
        Recipe(name="x", groups={"routers": "int8"})
    with pytest.raises(ValueError, match="embeddings must be one of fp32, int8, int4, got 'int3'"):
        Recipe(name="x", groups={"embeddings": "int3"})
    with pytest.raises(ValueError, match="quantizes nothing"):
        Recipe(name="x", groups={"attention": "fp32"})
    with pytest.raises(ValueError, match="block_size"):
        Recipe(name="x", groups={"experts": "int4"}, block_size=20)
    with pytest.raises(ValueError, match="exclude"):
        Recipe(name="x", groups={"experts": "int4"}, whole="fp16")
    with pytest.raises(ValueError, match="recipe must be one of"):
        recipe("int7")
    with pytest.raises(ValueError, match="'fp32' quantizes nothing"):
        recipe("fp32")
    assert recipe("fp32", {"experts": "int4"}).quantized == {"experts": "int4"}
    assert recipe("int8") is RECIPES["int8"]
    changed = recipe("int8", {"attention": "fp32"})
    assert changed.name == "int8[attention=fp32]"
    assert "attention" not in changed.quantized


def test_groups_are_those_of_weights():
    assert FORMATS.keys() <= set(contract.WEIGHT_GROUPS)
