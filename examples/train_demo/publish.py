"""Writes the measured tables into the pages of docs/ and draws their picture, from the JSON in `results/`.

With `--check` it only says whether the pages show what was measured.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from u2moe.benchmarks.results.marks import filled
from u2moe.benchmarks.results.marks import names as names_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMES = {
    "asterisk-sentences": "telephone prompts, one voice",
    "asterisk-words": "digits, letters, words, one voice",
    "heldout": "held-out synthetic voices",
    "pocketsphinx": "LibriVox, card names, commands",
    "queen-test": "acted game dialogue, 11 kHz",
    "saytime": "clock times, 8 kHz, one voice",
}
SHOWN = {
    "full context": "full attention_rescoring",
    "chunk 16": "16 attention_rescoring",
    "chunk 8": "8 attention_rescoring",
    "chunk 16, first pass alone": "16 ctc_prefix_beam",
}


def wer_table(results: dict[str, Any]) -> str:
    """Word error rates of the second pass by context, and of the first pass."""
    lines = ["| test set | words | " + " | ".join(SHOWN) + " |", "| --- |" + " ---: |" * (len(SHOWN) + 1)]
    for name, conditions in results.items():
        rates = " | ".join(f"{conditions[condition]['wer']:.1%}" for condition in SHOWN.values())
        num_words = next(iter(conditions.values()))["num_words"]
        lines.append(f"| {NAMES.get(name, name)} | {num_words} | {rates} |")
    title = "Word error rates (float32). Nobody here spoke in training; the synthetic voices were validation."
    return f"{title}\n\n" + "\n".join(lines)


def quantization_table(int8: dict[str, Any], int4: dict[str, Any]) -> str:
    """Bytes, errors and words of the quantized bundles beside the float32 one."""
    lines = ["| demo model | float32 | int8 | int4-experts |", "| --- | ---: | ---: | ---: |"]

    def row(title: str, *cells: str) -> None:
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    files = int8["bytes"]["files"]
    row("megabytes", *(f"{size / 1e6:.1f}" for size in (*files.values(), int4["bytes"]["files"]["after"])))
    for name, item in int8["text"].items():
        rates = item["wer_before"], item["wer_after"], int4["text"][name]["wer_after"]
        row(f"word errors of {item['num_words']}, {name.replace('_', ' ')}", *(f"{rate:.2%}" for rate in rates))
    frames = int8["speed"]["feature_frames"]
    for name, item in int8["speed"]["encoder"].items():
        times = item["before_s"], item["after_s"], int4["speed"]["encoder"][name]["after_s"]
        row(f"encoder, {frames / 100:.1f} s of audio, one thread, {name}", *(f"{time * 1e3:.1f} ms" for time in times))
    agreement = [list(report["routing_agreement"].values()) for report in (int8, int4)]
    row("tokens that keep their experts", "", *(f"{sum(part) / len(part):.2%}" for part in agreement))
    return "\n".join(lines)


def overlap_table(report: dict[str, Any]) -> str:
    """Shares of the n-grams of the test sets that training texts have."""
    lengths = next(iter(report["overlap"].values()))
    lines = ["| test set | " + " | ".join(f"{length} words" for length in lengths) + " |"]
    lines[0] = lines[0].replace("| 1 words", "| 1 word")
    lines.append("| --- |" + " ---: |" * len(lengths))
    for name, shares in report["overlap"].items():
        lines.append(f"| {NAMES[name]} | " + " | ".join(f"{share:.1%}" for share in shares.values()) + " |")
    used, left_out = report["num_training_texts"], report["num_withheld_texts"]
    return f"{used:,} different texts are trained on, {left_out:,} were left out.\n\n" + "\n".join(lines)


def draw(results: dict[str, Any], file: Path) -> None:
    """Bars of word error rates: first pass, then second pass, streaming in chunks of 16."""
    from matplotlib import pyplot as plt  # noqa: PLC0415 - needed for drawing only

    series = {
        "first pass, chunk 16": "16 ctc_prefix_beam",
        "second pass, chunk 16": "16 attention_rescoring",
        "second pass, full context": "full attention_rescoring",
    }
    names = sorted(results, key=lambda name: results[name]["full attention_rescoring"]["wer"], reverse=True)
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for index, ((title, condition), color) in enumerate(
        zip(series.items(), ("#b8c4d6", "#4c78a8", "#1b3a5c"), strict=True)
    ):
        places = [place - 0.27 * (index - 1) for place in range(len(names))]
        rates = [100 * results[name][condition]["wer"] for name in names]
        bars = axes.barh(places, rates, height=0.25, color=color, label=title)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
    axes.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names])
    axes.set_xlabel("word error rate, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper center", ncols=len(series), fontsize=8)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is not up to date")
    args = parser.parse_args()
    results = json.loads((HERE / "results" / "wer.json").read_text(encoding="utf-8"))
    names = ("quantization", "quantization-int4")
    reports = [json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    overlap = json.loads((HERE / "results" / "overlap.json").read_text(encoding="utf-8"))
    tables = {"docs/demo.md": {"wer": wer_table(results), "overlap": overlap_table(overlap)}}
    tables["docs/quantize.md"] = {"quantization": quantization_table(*reports)}
    for page, own in tables.items():
        old = (ROOT / page).read_text(encoding="utf-8")
        if missing := own.keys() - set(names_of(old, page)):
            sys.exit(f"{page}: no marks for {', '.join(sorted(missing))}")
        new = filled(old, own)
        if args.check and new != old:
            sys.exit(f"{page} does not show what examples/train_demo/results holds: run publish.py")
        (ROOT / page).write_text(new, encoding="utf-8")
    if not args.check:
        draw(results, ROOT / "docs" / "wer.png")


if __name__ == "__main__":
    main()
