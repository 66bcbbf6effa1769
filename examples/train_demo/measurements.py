"""Commands for the measurements of the demo model in `benchmarks/results`. As a script, it lists the missing ones.

    python measurements.py

Results of an earlier model are invalid: `release.py` removes them when it installs another one. TESTS are the lists of
recordings in `exp/test`; WORDS and SENTENCES are some of them. INT8, INT4, CALIBRATED, POINTWISE, ALL, SMALLEST and
FLOAT32 are the bundles in `exp/release`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from u2moe.benchmarks.results.files import read_json, write_json

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"
CELLS = "demo/"
"""Prefix of the demo model's entries in files with results of several models."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Command that makes a file of results, and its requirements.

    Attributes:
        command: command line after `python -m u2moe.benchmarks.studies.`, or a whole `u2moe` command.
        minutes: approximate time, on two idle cores.
        quiet: whether the command measures time, so that nothing else may run.
        needs: requirements besides the bundles.
        part: part of the file that belongs to the demo model; empty: the whole file.
    """

    command: str
    minutes: int
    quiet: bool = False
    needs: str = ""
    part: str = ""


MEASUREMENTS = {
    "calibration": Measurement(command="calibration INT8 TESTS --results FILE", minutes=2),
    "formats": Measurement(
        command="formats float32=FLOAT32 int8=INT8 'float32 with noise=FLOAT32+noise' "
        "'int8, onnxruntime alone=INT8@onnxruntime' int4-experts=INT4 'int4-experts, calibrated=CALIBRATED' "
        "'int4 but for pointwise convolutions, calibrated=POINTWISE' 'int4, calibrated=ALL' "
        "'int4 everywhere, calibrated=SMALLEST' --list TESTS --results FILE",
        minutes=25,
        needs="native kernels",
    ),
    "quantizers": Measurement(command="quantizers FLOAT32 SPEECH DEV NAME=FOLDER ... --results FILE", minutes=15),
    "hotwords": Measurement(command="hotwords INT8 TESTS --results FILE", minutes=5),
    "word_times": Measurement(command="word_times INT8 WORDS --sentences SENTENCES --results FILE", minutes=10),
    "runtimes": Measurement(
        command="runtimes --bundle float32=FLOAT32 --bundle int8=INT8 --list TESTS --speed --cpp PROGRAM "
        "--results FILE",
        minutes=20,
        quiet=True,
        needs="Node, C++",
    ),
    "bench": Measurement(command="u2moe bench runtime/demo --output FILE", minutes=3, quiet=True),
    "systems": Measurement(
        command="systems WORK --groups clips --results FILE", minutes=2, quiet=True, needs="network", part="clips"
    ),
    "serving": Measurement(command="serving WORK --bundle runtime/demo --name demo --cores 0", minutes=60, quiet=True),
}
"""Measurements by the name of their file, in the recommended order."""


def drop() -> None:
    """Remove the results of the demo model."""
    for name, own in MEASUREMENTS.items():
        file = FOLDER / f"{name}.json"
        content = read_json(file)
        if "cells" in content:
            cells = {key: cell for key, cell in content["cells"].items() if not key.startswith(CELLS)}
            write_json(file, {**content, "cells": cells})
        elif own.part and content:
            write_json(file, {key: value for key, value in content.items() if key != own.part})
        else:
            file.unlink(missing_ok=True)


def missing() -> Iterator[str]:
    """Yield the missing measurements with their commands."""
    for name, own in MEASUREMENTS.items():
        content = read_json(FOLDER / f"{name}.json")
        found = any(key.startswith(CELLS) for key in content.get("cells", {})) or own.part in content
        if not (found if own.part or "cells" in content else content):
            module = "" if own.command.startswith("u2moe") else "python -m u2moe.benchmarks.studies."
            notes = ", ".join([*["quiet"] * own.quiet, f"{own.minutes} min", *[f"needs {own.needs}"] * bool(own.needs)])
            yield f"{name}: {notes}\n    {module}{own.command.replace('FILE', f'benchmarks/results/{name}.json')}"


if __name__ == "__main__":
    print("\n".join(missing()) or "all measurements exist")
