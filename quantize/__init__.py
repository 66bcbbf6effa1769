"""Quantization of bundles. Needs onnx-ir, but not torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from u2moe.quantize.recipes import FORMATS, RECIPES, Goal, Recipe, recipe

if TYPE_CHECKING:
    from u2moe.quantize.inspection import inspect_bundle
    from u2moe.quantize.quantizer import quantize_bundle
    from u2moe.quantize.recordings import keep_calibration

__all__ = ["FORMATS", "RECIPES", "Goal", "Recipe", "inspect_bundle", "keep_calibration", "quantize_bundle", "recipe"]

_HOMES = {"inspect_bundle": "inspection", "keep_calibration": "recordings", "quantize_bundle": "quantizer"}


def __getattr__(name: str) -> Any:
    # modules are imported on first use, so that the command line can declare its arguments without loading onnx
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
