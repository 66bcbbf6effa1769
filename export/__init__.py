"""Exports a WeNet checkpoint to a bundle of ONNX graphs. torch is imported only on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from u2moe.export.checkpoint import Checkpoint
    from u2moe.export.comparison import Comparison, ParityReport
    from u2moe.export.exporter import export_bundle, export_random, validate_bundle
    from u2moe.export.profiles.conversion import Conversion, convert_bundle
    from u2moe.export.profiles.static import convert_static
    from u2moe.export.sherpa import SherpaExport, SherpaOptions, export_sherpa

__all__ = [
    "Checkpoint", "Comparison", "Conversion", "ParityReport", "SherpaExport", "SherpaOptions", "convert_bundle",
    "convert_static", "export_bundle", "export_random", "export_sherpa", "validate_bundle",
]  # fmt: skip

_HOMES = {
    "Checkpoint": "checkpoint", "Comparison": "comparison", "Conversion": "profiles.conversion",
    "ParityReport": "comparison", "SherpaExport": "sherpa", "SherpaOptions": "sherpa",
    "convert_bundle": "profiles.conversion", "convert_static": "profiles.static", "export_bundle": "exporter",
    "export_random": "exporter", "export_sherpa": "sherpa", "validate_bundle": "exporter",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # modules are loaded on first use, so that the command line can declare its arguments without loading torch
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
