"""Writes the tables of README.md here from the JSON files in results/, each between its marks. Measures nothing.

    python -m u2moe.benchmarks.results.tables [--check]

A table is what `table(results)` of its module makes of results/NAME.json. What
their `targets(results)` tell, where they have that, is gathered in a table of its own. Text outside of the marks is
left alone; a table without marks is put at the end. `--check` writes nothing and exits with 1 when README.md is not
what the results say.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from u2moe.benchmarks.results.targets import Target, targets_table

TARGETS = "targets"
TITLES = {
    TARGETS: "Targets, and what was found",
    "bench": "The demo model: `u2moe bench`",
    "full_size": "The paper's table at full size",
    "kernel_peers": "The same weights by other means",
    "moe_layer": "One mixture of experts, and its bound",
    "sherpa_peer": "sherpa-onnx on the same graph",
    "system_peers": "Whole systems",
    "levers": "Faster at the price of words",
    "calibration": "What confidence is worth",
    "hotwords": "What hotwords find",
    "word_times": "How exact the times of words are",
    "soak": "Hours of audio, many streams",
    "fuzz": "Damaged files",
}
"""Names of results, and of what is gathered from all, in the order of the sections that are made for them."""
_MODULES = {
    "bench": "bench.page",
    "full_size": "full_size.page",
    "kernel_peers": "peers.same_weights",
    "moe_layer": "full_size.moe_layer",
    "sherpa_peer": "peers.sherpa",
    "system_peers": "peers.systems",
    "levers": "quality.levers",
    "calibration": "quality.calibration",
    "hotwords": "quality.hotwords",
    "word_times": "quality.word_times",
    "soak": "endurance.soak",
    "fuzz": "endurance.fuzz",
}
"""Where `table(results)` of each is."""
FOLDER = Path(__file__).parents[1]


def tables(folder: Path) -> dict[str, str]:
    """The table of every results file in `folder` that there is, after that of the targets of all."""
    targets: list[Target] = []
    found = {}
    for name in TITLES:
        file = folder / f"{name}.json"
        if file.is_file():
            module, results = _module(name), json.loads(file.read_text(encoding="utf-8"))
            found[name] = module.table(results)
            targets += module.targets(results) if hasattr(module, "targets") else []
    return {**({TARGETS: targets_table(targets)} if targets else {}), **found}


def _module(name: str) -> Any:
    """The module that makes a table; its `table` and `targets` are known by name alone."""
    return importlib.import_module(f"u2moe.benchmarks.{_MODULES[name]}")


def updated(text: str, content: Mapping[str, str]) -> str:
    """`text` with every table between its marks."""
    for name, table in content.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        section = f"{begin}\n{table.strip()}\n{end}"
        if begin not in text:
            text = f"{text.rstrip()}\n\n## {TITLES[name]}\n\n{section}\n"
            continue
        before, _, rest = text.partition(begin)
        if end not in rest:
            raise ValueError(f"README.md: {begin} without {end}")
        text = before + section + rest.partition(end)[2]
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m u2moe.benchmarks.results.tables", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if README.md would change")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="with README.md and results/ (default: here)")
    args = parser.parse_args(arguments)
    readme = args.folder / "README.md"
    before = readme.read_text(encoding="utf-8") if readme.exists() else "# Benchmarks\n"
    after = updated(before, tables(args.folder / "results"))
    if args.check:
        return int(after != before)
    if after != before:
        readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
