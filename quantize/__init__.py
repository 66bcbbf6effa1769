"""Quantization that knows a mixture of experts: a bundle in, another bundle out. Needs onnx, never torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from u2moe.quantize.config import FORMATS, RECIPES, Recipe, Tune, recipe

if TYPE_CHECKING:
    from u2moe.quantize.quantizer import quantize_bundle

__all__ = ["FORMATS", "RECIPES", "Recipe", "Tune", "quantize_bundle", "recipe"]


def __getattr__(name: str) -> Any:
    # loaded on first use: the command line imports this package for its sub-command's arguments, without onnx
    if name != "quantize_bundle":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("u2moe.quantize.quantizer"), name)
