"""Writes the numbers and tables of all pages in docs/ from the JSON files in benchmarks/results. Measures nothing.

    python -m u2moe.benchmarks.results.pages [--check]

The values that pages may show from results/NAME.json are those returned by `values(results)` of its module.
docs/results/NAME.md uses their plain names, every other page NAME.name. The targets returned by `targets(results)` of
the modules that have it are collected on a separate page. `--check` writes nothing and exits with 1 if a page is not up
to date.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from u2moe.benchmarks.results import targets as target_page
from u2moe.benchmarks.results.files import read_json, repository
from u2moe.benchmarks.results.marks import filled, names
from u2moe.benchmarks.results.provenance import measured
from u2moe.benchmarks.script import run_script, script_parser

MODULES = {
    "bench": "bench.page",
    "first_chunk": "bench.first_chunk",
    "full_size": "full_size.page",
    "native": "full_size.native",
    "huge_pages": "full_size.huge_pages",
    "moe_layer": "full_size.moe_layer_page",
    "products": "peers.products",
    "same_weights": "peers.same_weights",
    "sherpa": "peers.sherpa",
    "systems": "peers.systems",
    "formats": "quality.formats",
    "kernels": "quality.kernels",
    "processors": "quality.processors",
    "front_end": "quality.front_end",
    "runtimes": "runtimes.equality",
    "first_difference": "runtimes.first_difference",
    "runtimes_speed": "runtimes.speed",
    "providers": "runtimes.providers",
    "calibration": "quality.calibration",
    "hotwords": "quality.hotwords",
    "language_models": "quality.language_models",
    "language_model_cost": "quality.language_model_cost",
    "word_times": "quality.word_times",
    "soak": "endurance.soak",
    "soak_native": "endurance.soak",
    "fuzz": "endurance.fuzz",
    "fuzz_native": "endurance.fuzz",
    "sanitized_kernels": "endurance.sanitized_kernels",
    "long_video": "endurance.long_video",
    "serving": "serving.load",
    "churn": "serving.churn",
    "damaged": "serving.damaged",
    "corpora": "peers.corpora",
    "kills": "endurance.kills",
    "long_manifest": "endurance.long_manifest",
}
"""The module for each results file, in the order in which targets are listed."""
TARGETS = "targets"
ELSEWHERE = {
    *("wer", "silence", "num_silences", "rtf", "rare_experts", "experts", "earlier", "overlap", "quantization"),
    *("proof", "specialists", "edges"),
}
"""Of the demo model, which examples/train_demo/publish.py fills in."""

Values = dict[str, dict[str, str]]


def all_values(folder: Path) -> Values:
    """The values from each results file in `folder`, and from the targets."""
    found: Values = {}
    targets: list[target_page.Target] = []
    for name in MODULES:
        if results := read_json(folder / f"{name}.json"):
            module = _module(name)
            found[name] = {"measured": measured(results), **module.values(results)}
            targets += module.targets(results) if hasattr(module, "targets") else []
    return {**found, TARGETS: target_page.values(targets)}


def _module(name: str) -> Any:
    return importlib.import_module(f"u2moe.benchmarks.{MODULES[name]}")


def updated(root: Path, values: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[Path, str]]:
    """Outdated pages of a clone, with their updated content.

    Raises:
        ValueError: a mark without an end, or with an unknown name.
    """
    everywhere = {f"{name}.{key}": value for name, own in values.items() for key, value in own.items()}
    for page in sorted((root / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        own = values.get(page.stem, {}) if page.parent.name == "results" else {}
        known = {**everywhere, **own}
        if unknown := set(names(text, str(page))) - known.keys() - ELSEWHERE:
            raise ValueError(f"{page}: no results have {', '.join(sorted(unknown))}")
        if (shown := filled(text, known)) != text:
            yield page, shown


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = script_parser("results.pages", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is not up to date")
    args = parser.parse_args(arguments)
    root = repository()
    changed = dict(updated(root, all_values(root / "benchmarks" / "results")))
    for page, text in changed.items():
        print(f"{page.relative_to(root)}: {'is not up to date' if args.check else 'written'}")
        if not args.check:
            page.write_text(text, encoding="utf-8")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    run_script(main)
