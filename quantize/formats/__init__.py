"""Conversions of weights, and of the layers that read them, to each format."""

from collections.abc import Mapping
from types import MappingProxyType

from u2moe.quantize.formats.conversion import WeightConversion
from u2moe.quantize.formats.int4 import Int4Conversion
from u2moe.quantize.formats.int8 import Int8Conversion
from u2moe.quantize.recipes import Recipe
from u2moe.runtime.bundle.weight_formats import WEIGHT_FORMATS

CONVERSIONS: Mapping[str, type[WeightConversion]] = MappingProxyType(
    {made.form.name: made for made in (Int8Conversion, Int4Conversion)}
)
"""Conversions by format name; floating-point formats need none."""


def conversion(name: str, block_size: int = 32) -> WeightConversion:
    """Return the conversion to a format. Formats without blocks of rows ignore `block_size`."""
    return CONVERSIONS[name](block_size if WEIGHT_FORMATS[name].block_sizes else 0)


def conversion_for(recipe: Recipe, layer: str, group: str) -> WeightConversion | None:
    """Return a recipe's conversion for weights of `layer` that belong to `group`; None for a floating-point format."""
    name = recipe.format_of(layer, group)
    return conversion(name, recipe.block_size) if name in CONVERSIONS else None
