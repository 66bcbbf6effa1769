"""Writes measurements into the pages of docs/ and draws their pictures, from the JSON in `results/` and `run/`.

With `--check` it only checks that the pages are up to date.
"""

import argparse
import csv
import sys
from pathlib import Path

import tables

from u2moe.benchmarks.results.files import read_json
from u2moe.benchmarks.results.markdown import filled
from u2moe.benchmarks.results.markdown import names as names_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECIPE = "examples/train_demo/README.md"
DEMO = ROOT / "runtime" / "demo" / "bundle.json"


def runs() -> list[Path]:
    """Return the validation tables of the dense run and of its forks."""
    return [HERE / "run" / "validation.tsv", *sorted((HERE / "run").glob("*/validation.tsv"))]


def trained(table: Path) -> str:
    """Return the steps and hours of a run's training up to its last validation, as text."""
    with table.open(encoding="utf-8", newline="") as rows:
        *_, last = csv.DictReader(rows, delimiter="\t")
    hours, heard = float(last["hours"]), float(last["hours heard"])
    return f"{int(last['step']):,} steps in {hours:.1f} hours, with {heard:.0f} hours of speech"


def values() -> dict[str, dict[str, str]]:
    """Return the text between the marks of each page."""
    found = {path.stem: read_json(path) for path in (HERE / "results").glob("*.json")}
    demo = {
        "wer": tables.wer_table(found["wer"], found.get("peers", {})),
        "silence": tables.silence(found["wer"]),
        "num_silences": str(found["wer"]["int8"]["num_silences"]),
        "rtf": tables.real_time_factors(found["wer"]),
        "chosen": tables.chosen(found["wer"]),
        "costs": tables.costs(found["wer"]),
        "overlap": tables.overlap_table(found["overlap"]),
        "rare_experts": tables.rare_experts(found["experts"]),
        "experts": tables.experts_table(found["experts"]),
        "specialists": tables.specialists(found["specialists"]),
    }
    if "proof" in found:
        demo["proof"] = tables.proof_table(found["proof"])
    recipe = {"trained": trained(runs()[0]), "edges": tables.edges_table(found["edges"])}
    card = {"index": tables.card_index(found["wer"]), "wer": tables.card_table(found["wer"])}
    gain = tables.edges_gain(found["edges"], read_json(DEMO)["decoding"]["padding_s"])
    return {
        "docs/demo.md": demo,
        "docs/recognise.md": {"edges": gain},
        RECIPE: recipe,
        "runtime/demo/README.md": card,
    }


def draw() -> None:
    """Draw the pictures of the pages."""
    import pictures  # noqa: PLC0415 - only drawing needs matplotlib

    pictures.draw_word_errors(read_json(HERE / "results" / "wer.json"), ROOT / "docs" / "wer.png")
    pictures.draw_training(runs(), ROOT / "docs" / "training.png")
    pictures.draw_specialists(read_json(HERE / "results" / "specialists.json"), ROOT / "docs" / "specialists.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is not up to date")
    args = parser.parse_args()
    for page, own in values().items():
        old = (ROOT / page).read_text(encoding="utf-8")
        if missing := own.keys() - set(names_of(old, page)):
            sys.exit(f"{page}: no marks for {', '.join(sorted(missing))}")
        new = filled(old, own)
        if args.check and new != old:
            sys.exit(f"{page} does not match examples/train_demo/results: run publish.py")
        (ROOT / page).write_text(new, encoding="utf-8")
    if not args.check:
        draw()


if __name__ == "__main__":
    main()
