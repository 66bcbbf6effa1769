"""How much memory does quantization take?

    python -m u2moe.benchmarks.studies.quantizing_memory BUNDLE SPEECH.tsv

Measures the peak memory of separate processes. Each process makes an int8 bundle in one of four ways: without a
report, with a report on the demo model's clips, with calibration on the recordings of SPEECH.tsv, or with calibration
and a divergence limit that is met immediately.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from u2moe.benchmarks.instruments.statistics import show_progress
from u2moe.benchmarks.results.files import publish
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.studies.shared.script import peak_memory, script, study_parser
from u2moe.runtime import Bundle

MODES: Mapping[str, Sequence[str]] = {
    "--no-report": ["--no-report"],
    "": [],
    "--calibrate": ["--calibrate", "{speech}"],
    "--calibrate --max-divergence 99": ["--calibrate", "{speech}", "--max-divergence", "99"],
}
"""Options of `u2moe quantize --recipe int8`, by title."""


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for pages: the bundle's size, and a table with a row for each command."""
    peaks = results["peaks"].items()
    rows = [(f"`u2moe quantize {title}`".replace(" `", "`"), f"{most / 1e6:,.0f}") for title, most in peaks]
    return {"float32": f"{results['bytes'] / 1e6:.0f}", "table": table(("command", "peak memory, MB"), rows)}


@script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("quantizing_memory", __doc__)
    parser.add_argument("bundle", type=Path, help="folder of a float32 bundle")
    parser.add_argument("speech", type=Path, help="list of recordings for --calibrate")
    args = parser.parse_args(arguments)
    peaks: dict[str, int] = {}
    for title, options in MODES.items():
        chosen = [option.format(speech=args.speech) for option in options]
        with tempfile.TemporaryDirectory() as folder:
            command = ("quantize", args.bundle, f"{folder}/out", "--recipe", "int8", "--accept-damage", *chosen)
            peaks[title] = peak_memory(*command)
        show_progress(f"{title}: {peaks[title] / 1e6:.0f} MB")
    size = sum(file.size for file in Bundle.open(args.bundle).manifest.files.values())
    publish(args.results, {"bytes": size, "peaks": peaks}, values, bundle=args.bundle)
