"""Draw the picture in the project's README from the JSON files in this folder.

python -m u2moe.benchmarks.results.picture
"""

from pathlib import Path

from u2moe.benchmarks.instruments.statistics import Spread, spread_of
from u2moe.benchmarks.instruments.workload import CHUNK_S, UTTERANCE_S
from u2moe.benchmarks.results.files import kind_of, read_json, repository, results_file
from u2moe.benchmarks.studies import full_size
from u2moe.benchmarks.studies.shared.random_models import NAMES
from u2moe.benchmarks.studies.shared.script import script
from u2moe.benchmarks.studies.systems import SHERPA

PICTURE = Path("docs/images/speed.png")  # relative to the root of a clone
PANELS = {"streaming": "chunks of 16 frames (0.64 s)", "full": "whole utterances of 10 s"}
NATIVE, ALONE, OTHERS = "u2moe with native kernels", "u2moe on onnxruntime", "others"
COLOURS = {NATIVE: "#0b5394", ALONE: "#8fb3d9", OTHERS: "#b7b7b7"}
ROWS = {
    NATIVE: (full_size.DENSE, full_size.INT8, full_size.NATIVE_LARGE),
    ALONE: (full_size.PLAIN_DENSE, full_size.PLAIN_INT8, full_size.PLAIN_LARGE),
}
CASES = {case: by for by, own in ROWS.items() for case in own} | {full_size.INT4: NATIVE}

Bar = tuple[str, Spread, str]  # one row: its label, its real-time factor, and its engine, which is a key of `COLOURS`


def machine() -> str:
    """Return the kind of machine that all rows must come from: the one on which torch was measured."""
    return kind_of(read_json(results_file("same_weights"))["machine"])


def bars(mode: str) -> list[Bar]:
    """Return the rows of one panel, from top to bottom.

    The times of u2moe and torch include only the encoder and the CTC head. Those of sherpa-onnx also include features
    and greedy search, which add a few percent for models of this size.
    """
    contents = read_json(results_file("full_size"))["machines"].values()
    *_, own = (content for content in contents if kind_of(content["machine"]) == machine())
    found = [
        (f"{NAMES[case.model]}, {case.format}", spread, by)
        for case, by in CASES.items()
        if (spread := full_size.factor(own, mode, case))
    ]
    group = read_json(results_file("systems"))[mode]
    if kind_of(group["machine"]) == machine():
        sherpa = group["peers"][SHERPA]
        spread = Spread.of([seconds / sherpa["audio_s"] for seconds in sherpa["compute_s"]])
        found.append(("Dense-225M, int8, sherpa-onnx", spread, OTHERS))
    torch = read_json(results_file("same_weights"))["modes"][mode]["torch"]["ms"]
    scale = 1e-3 / (CHUNK_S if mode == "streaming" else UTTERANCE_S)
    return [*found, ("MoE-1B, float32, torch (WeNet)", spread_of(torch, scale), OTHERS)]


def draw(file: Path) -> None:
    """Write the picture. Raise ModuleNotFoundError if matplotlib is not installed."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional
    from matplotlib.patches import Patch  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415 - comes with matplotlib

    figure = Figure(figsize=(9, 1.8 + 0.4 * len(bars("full"))), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (mode, title) in zip(panels, PANELS.items(), strict=True):
        rows = [(label, factor.median, COLOURS[by]) for label, factor, by in bars(mode)]
        labels, factors, colours = zip(*rows, strict=True)
        drawn = axes.barh(range(len(rows)), factors, color=colours, height=0.7)
        axes.bar_label(drawn, fmt="%.3f", padding=3, fontsize=9)
        axes.set_yticks(range(len(rows)), labels, fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, max(factors) * 1.15)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    sizes = ", ".join(f"{NAMES[case.model]} {case.size}" for case in ROWS[ALONE])
    figure.suptitle(
        "Seconds of one processor core per second of speech: lower is better\n"
        f"one thread of an {machine()}; random weights; sizes are ours\n"
        f"million parameters / active for a token: {sizes}",
        fontsize=10,
    )
    patches = [Patch(color=colour, label=by) for by, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=9, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    with Image.open(file) as image:  # with a palette, the file is a third as large
        image.convert("RGB").quantize(64).save(file, optimize=True)


@script
def main() -> None:
    draw(repository() / PICTURE)
    print(f"wrote {PICTURE}")
