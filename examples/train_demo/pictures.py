"""Draws the documentation's pictures: word error rates, their changes during training, and the choices of experts."""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from tables import SETS, Results, layer_name

SERIES = {
    "first pass, chunk 16": ("16 ctc_prefix_beam", "#b8c4d6"),
    "second pass, chunk 16": ("16 attention_rescoring", "#4c78a8"),
    "second pass, full context": ("full attention_rescoring", "#1b3a5c"),
}
VALIDATION = {"queen-dev": ("actors", "#1b3a5c"), "heldout": ("synthetic voices", "#d08c3f")}
LABELS = {"phone": "#1b3a5c", "speaker": "#d08c3f", "band": "#6a9f58"}
"""Colours of the properties of speech about which the choice of an expert gives information."""
CONTEXTS = {"all": ("full context", "-"), "16": ("chunk 16", "--")}


def save(figure: Figure, file: Path) -> None:
    """Write a picture that is identical on every machine. A palette makes the file three times smaller."""
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})
    plt.close(figure)
    colours = Image.open(file).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    colours.save(file, optimize=True)


def draw_word_errors(results: Results, file: Path) -> None:
    """Draw the shipped model's word error rates with intervals. The set with the lowest rate is at the bottom."""
    own = results["int8"]["sets"]
    names = sorted(
        SETS.keys() & own.keys(), key=lambda name: own[name]["full attention_rescoring"]["wer"], reverse=True
    )
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for index, (title, (condition, color)) in enumerate(SERIES.items()):
        places = [place - 0.27 * (index - 1) for place in range(len(names))]
        found = [own[name][condition] for name in names]
        rates = [100 * item["wer"] for item in found]
        around = [[abs(item["wer"] - item["interval"][side]) * 100 for item in found] for side in (0, 1)]
        error: dict[str, Any] = {"ecolor": "#777777", "elinewidth": 0.8, "capsize": 1.5}
        bars = axes.barh(places, rates, height=0.25, color=color, label=title, xerr=around, error_kw=error)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
    axes.set_yticks(range(len(names)), [SETS[name] for name in names])
    axes.set_xlabel("word error rate, %, with 95 % intervals")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper center", ncols=len(SERIES), fontsize=8)
    save(figure, file)


def draw_training(tables: list[Path], file: Path) -> None:
    """Draw word error rates in validation over the hours of training. The dense run comes first, then its forks."""
    curves = defaultdict(list)
    for number, path in enumerate(tables):
        with path.open(encoding="utf-8", newline="") as rows:
            for row in csv.DictReader(rows, delimiter="\t"):
                point = float(row["hours"]), 100 * float(row["word error rate"]), float(row["hours heard"])
                curves[number, row["set"], row["chunk"]].append(point)
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for (number, name, chunk), points in curves.items():
        (title, color), (context, style) = VALIDATION[name], CONTEXTS[chunk]
        hours, rates, _ = zip(*points, strict=True)
        label = None if number else f"{title}, {context}"
        axes.plot(hours, rates, style, color=color, marker="s" if number else "o", markersize=3, label=label)
    starts = [min(points[0][0] for key, points in curves.items() if key[0] == number) for number in range(len(tables))]
    for start in starts[1:]:
        axes.axvline(start, color="#999999", linewidth=0.8, linestyle=":")
    axes.plot([], [], "o", color="#777777", markersize=3, label="dense network")
    axes.plot([], [], "s:", color="#777777", markersize=3, linewidth=0.8, label="forks, and when they started")
    axes.set_xlabel("hours of training")
    axes.set_ylabel("word error rate, %, first pass without beam")
    axes.set_ylim(0, 105)
    axes.set_xlim(left=0)
    axes.grid(color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    save(figure, file)


def draw_specialists(results: Results, file: Path) -> None:
    """Draw the information in the choice of experts for each layer, and the phones of each expert in the best layer."""
    figure, (bits, phones) = plt.subplots(2, figsize=(8, 5.4), layout="constrained", height_ratios=(1, 1.1))
    layers, best = results["layers"], results["best"]
    for label, color in LABELS.items():
        found = [own[label] for own in layers.values()]
        bits.plot([item["bits"] for item in found], "o-", color=color, markersize=3, label=label)
        bits.plot([item["chance"] for item in found], ":", color=color, linewidth=1)
    names = [layer_name(name) for name in layers]
    bits.set_xticks(range(len(names)), names, fontsize=8)
    bits.set_xlabel("layers of experts, two in each encoder block")
    bits.set_ylabel("bits (dotted: by chance)")
    bits.set_ylim(bottom=0)
    bits.legend(frameon=False, fontsize=8)
    bits.grid(color="#eeeeee")
    bits.spines[["top", "right"]].set_visible(False)
    columns = list(best["phones"])
    rows = list(zip(*best["phones"].values(), strict=True))
    shown = phones.imshow([[200 * share for share in row] for row in rows], cmap="Blues", vmin=0, aspect="auto")
    phones.set_xticks(range(len(columns)), columns, fontsize=7, rotation=90)
    phones.set_yticks(range(len(rows)), range(len(rows)), fontsize=7)
    phones.set_ylabel("expert")
    phones.set_title(f"share of a phone's frames by expert, layer {layer_name(best['layer'])}", fontsize=9)
    figure.colorbar(shown, ax=phones, label="% (even: 25)", pad=0.01)
    save(figure, file)
