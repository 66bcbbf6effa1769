"""The results of `full_size` as Markdown, and the targets that were set for them. Measures nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from u2moe.benchmarks.full_size.measure import (
    AS_DEMO,
    BOUND_S,
    BOUNDS,
    DEMO,
    EVEN,
    LARGE,
    MIXTURE,
    OWN,
    ROUTED,
    SKIPPING,
    SKIPPING_ROUTED,
    SMALL,
    Cell,
    all_cells,
)
from u2moe.benchmarks.full_size.models import PRECISIONS
from u2moe.benchmarks.instruments.statistics import Spread
from u2moe.benchmarks.instruments.workload import (
    CHUNK_S,
    NUM_CHUNKS,
    NUM_HYPOTHESES,
    NUM_STREAMS,
    NUM_TOKENS,
    UTTERANCE_S,
    audio_seconds,
)
from u2moe.benchmarks.results.provenance import sentence
from u2moe.benchmarks.results.targets import Target, quartiles, short

Results = Mapping[str, Any]
AS_ROUTED = f"{MIXTURE}/{ROUTED}"
NAMES = {SMALL: "Dense-225M", MIXTURE: "MoE-1B", AS_ROUTED: "MoE-1B, routed as the demo model", LARGE: "Dense-1B"}
RATIOS = ((MIXTURE, SMALL), (AS_ROUTED, SMALL), (MIXTURE, LARGE))
SKIPPED = {
    f"{MIXTURE}/{SKIPPING}": (MIXTURE, "even routing"),
    f"{MIXTURE}/{SKIPPING_ROUTED}": (AS_ROUTED, "routed as the demo model"),
}
"""Cases that skip experts: the same without that, and how they are routed."""
TITLES = {
    "streaming": "streaming",
    "streaming-8": f"streaming, batch of {NUM_STREAMS}",
    "full": "full context",
    "second-pass": "second pass",
    "bound-streaming": "streaming",
    "bound-full": "full context",
}
TRIED = (
    "tried without gain: DynamicQuantizeMatMul, uint8 weights, MatMulNBits and QMoE for the experts, hidden "
    "activations, or bias and activation, of all experts together, huge pages, caches as OrtValues"
)
"""What was tried against the time of the experts in int8 and of the rest; the commits have the numbers."""
TRIED_MEMORY = (
    "onnxruntime's arena takes the next power of two; one that takes what is needed keeps 4.7 GB after 2 to 30 s of "
    "speech; none, or giving it back after each run, takes 15 to 17 % longer; weights that are packed beforehand and "
    "mapped need as much"
)
"""What was tried against the memory of an utterance, with Dense-225M in int8; the commits have the numbers."""
ENCODER_PARTS = ("subsampling", "feed_forward", "attention", "convolution", "other")
MEMORY_FACTOR, MEMORY_MB = 1.15, 300


def cell_of(results: Results, mode: str, precision: str = "int8", num_threads: int = 1) -> Mapping[str, Any]:
    """What was measured in one setting, by model; empty if it was not."""
    key = Cell(precision=precision, num_threads=num_threads, mode=mode).key
    found: Mapping[str, Any] = results["cells"].get(key, {})
    return found


def spread(cell: Mapping[str, Any], mode: str, model: str) -> Spread:
    """Median and quartiles of the real-time factor of a cell; of the second pass, of its seconds."""
    scale = 1.0 if mode == "second-pass" else audio_seconds(mode)
    return Spread.of([value / scale for value in cell[model]["seconds"]])


def ratio(cell: Mapping[str, Any], model: str, other: str) -> Spread:
    """How many times as long `model` takes as `other`: the spread of the ratios of rounds, which were in turn."""
    pairs = zip(cell[model]["seconds"], cell[other]["seconds"], strict=True)
    return Spread.of([own / others for own, others in pairs])


def targets(results: Results) -> list[Target]:
    """All targets whose cells have been measured: int8, one thread."""
    return [
        *_ratio_targets(results),
        *_skip_targets(results),
        *_bound_targets(results),
        *_other_targets(results),
        *_start_targets(results),
    ]


def _ratio_targets(results: Results) -> list[Target]:
    found = []
    reads, arithmetic = _reads(results), _arithmetic(results)
    for mode, limit, bound in (("streaming", 2.1, reads), ("streaming-8", 2.1, reads), ("full", 1.55, arithmetic)):
        cell = cell_of(results, mode)
        for model, how in ((MIXTURE, "even routing"), (AS_ROUTED, "routed as the demo model")):
            if model in cell:
                name = f"RTF of MoE-1B / Dense-225M, {TITLES[mode]}, {how}"
                value = ratio(cell, model, SMALL)
                found.append(Target(name=name, found=value, limit=limit, at_most=True, bound=bound))
    if cell := cell_of(results, "full"):
        name = "RTF of Dense-1B / MoE-1B, full context"
        found.append(Target(name=name, found=ratio(cell, LARGE, MIXTURE), limit=2.5, at_most=False, bound=arithmetic))
    return found


def _skip_targets(results: Results) -> list[Target]:
    """The paper's ratio, with the lever."""
    found, cell = [], cell_of(results, "full")
    for case, (plain, how) in SKIPPED.items():
        if case in cell:
            lever = results["skipping"][DEMO]
            name = (
                f"RTF of MoE-1B / Dense-225M, full context, {how}, {lever['tokens']:.0%} of tokens skip an expert "
                f"({lever['cost']:+.1%} word errors in the demo model)"
            )
            bound = f"without skipping {ratio(cell, plain, SMALL).median:.2f}; {_one_expert(results)}"
            value = ratio(cell, case, SMALL)
            found.append(Target(name=name, found=value, limit=1.2, at_most=True, bound=bound))
    return found


def _one_expert(results: Results) -> str:
    """What the ratio could be at best: the bound of both encoders, if a token has so many experts fewer."""
    bound = cell_of(results, "bound-full")
    if not bound:
        return ""
    own, small = (
        {part: item["least_s"] for part, item in _encoder_parts(bound[name]).items()} for name in (MIXTURE, SMALL)
    )
    kept = (2 - results["skipping"]["tokens"][EVEN]) / 2
    least = sum(own.values()) - own["feed_forward"] * (1 - kept)
    return (
        f"of its bounds in full context (Dense-225M: {1e3 * sum(small.values()):.0f} ms) experts are "
        f"{1e3 * own['feed_forward']:.0f} of {1e3 * sum(own.values()):.0f} ms, with {2 * kept:.2f} instead of 2 for a "
        f"token {1e3 * least:.0f} ms in all, {least / sum(small.values()):.2f} times"
    )


def _reads(results: Results) -> str:
    """What reading experts bounds, evenly routed."""
    bound, streaming = cell_of(results, "bound-streaming"), cell_of(results, "streaming")
    if not bound or not streaming:
        return ""
    touched = results["routings"][EVEN]["touched"] / results["routings"][OWN]["touched"]
    part = bound[MIXTURE]["parts"]["feed_forward"]
    read_s = part["read_s"] * touched * CHUNK_S / bound[MIXTURE]["audio_s"]
    dense_s, mixture_s = (spread(streaming, "streaming", name).median * CHUNK_S for name in (SMALL, MIXTURE))
    return (
        f"reading the {results['routings'][EVEN]['touched']:.1f} experts that a chunk touches takes "
        f"{1e3 * read_s:.0f} of its {1e3 * mixture_s:.0f} ms at {bound[MIXTURE]['rates']['read'] / 1e9:.0f} GB/s, "
        f"{read_s / dense_s:.2f} times all of Dense-225M; {TRIED}"
    )


def _arithmetic(results: Results) -> str:
    """What multiply-adds bound in full context."""
    bound = cell_of(results, "bound-full")
    if not bound:
        return ""
    own, small = (sum(part["least_s"] for part in _encoder_parts(bound[name]).values()) for name in (MIXTURE, SMALL))
    above, small_above = (encoder_ratio(bound[name]).median for name in (MIXTURE, SMALL))
    return (
        f"the bounds of both encoders are {1e3 * own:.0f} and {1e3 * small:.0f} ms ({own / small:.2f}), of which "
        f"MoE-1B takes {above:.2f} and Dense-225M {small_above:.2f} times"
    )


def _encoder_parts(entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: entry["parts"][name] for name in ENCODER_PARTS if name in entry["parts"]}


def encoder_ratio(entry: Mapping[str, Any]) -> Spread:
    """Seconds of the encoder over the sum of the bounds of its parts."""
    least_s = sum(part["least_s"] for part in _encoder_parts(entry).values())
    return _scaled(entry["stages"]["encoder"], 1 / least_s)


def _scaled(spread: Mapping[str, Any], factor: float) -> Spread:
    """A spread as it stands in JSON, in another unit."""
    values = {name: factor * spread[name] for name in ("median", "low", "high")}
    return Spread(**values, count=spread["count"])


def _bound_targets(results: Results) -> list[Target]:
    found = []
    for mode in BOUNDS:
        if cell := cell_of(results, mode):
            entry = cell[MIXTURE]
            least = sum(part["least_s"] for part in _encoder_parts(entry).values())
            above = {name: part["seconds"] - part["least_s"] for name, part in _encoder_parts(entry).items()}
            above = dict(sorted(above.items(), key=lambda item: -item[1]))
            shares = ", ".join(f"{name.replace('_', ' ')} {value / least:.2f}" for name, value in above.items())
            name = f"encoder of MoE-1B / its bound, {TITLES[mode]}"
            both = sum(part["arithmetic_s"] + part["read_s"] for part in _encoder_parts(entry).values())
            bound = (
                f"above the bound of the whole are {shares}; onnxruntime's products read weights and multiply one "
                f"after the other, which alone is {both / least:.2f} times the bound; {TRIED}"
            )
            found.append(Target(name=name, found=encoder_ratio(entry), limit=1.5, at_most=True, bound=bound))
    return found


def _other_targets(results: Results) -> list[Target]:
    found = []
    if cell := cell_of(results, "second-pass"):
        value = Spread.of([1e3 * seconds for seconds in cell[MIXTURE]["seconds"]])
        name = f"second pass of MoE-1B, {UTTERANCE_S:g} s, {NUM_HYPOTHESES} hypotheses"
        found.append(Target(name=name, found=value, limit=200, at_most=True, unit=" ms"))
    alone, together = cell_of(results, "streaming"), cell_of(results, "streaming-8")
    if alone and together:
        one, eight = spread(alone, "streaming", MIXTURE), spread(together, "streaming-8", MIXTURE)
        value = Spread(
            median=one.median / eight.median, low=one.low / eight.high, high=one.high / eight.low, count=one.count
        )  # of two cells: the widest that their quartiles allow
        name = f"throughput of {NUM_STREAMS} streams of MoE-1B in a batch / one"
        found.append(Target(name=name, found=value, limit=1.4, at_most=False))
    return found


def _start_targets(results: Results) -> list[Target]:
    found = []
    for name, item in cell_of(results, "start").items():
        verify, load = item["verify_s"]["median"], item["load_s"]["median"]
        disk, loaded = item["disk"]["files"], item["loaded_bytes"]["median"]
        limit = MEMORY_FACTOR * disk / 1e6 + MEMORY_MB
        spent = f"checking sha256 takes {verify:.1f} s ({disk / verify / 1e9:.1f} GB/s), the sessions {load:.1f} s"
        held = (
            f"{loaded / 1e6:.0f} MB when loaded, the rest is what an utterance of {UTTERANCE_S:g} s needs in full "
            f"context; {TRIED_MEMORY}"
        )
        title, start, peak = NAMES[name], _scaled(item["start_s"], 1), _scaled(item["peak_bytes"], 1e-6)
        found += [
            Target(name=f"{title}: check and load", found=start, limit=3, at_most=True, unit=" s", bound=spent),
            Target(name=f"{title}: peak memory", found=peak, limit=limit, at_most=True, unit=" MB", bound=held),
        ]
    return found


TEXT = f"""Encoder and CTC head alone, features and search left out; medians, quartiles in brackets; the models took
turns in every round, and ratios are those of rounds. Streaming: chunks of 16 frames ({CHUNK_S:g} s)
with 4 chunks left, {NUM_CHUNKS["streaming"]} chunks in steady state; real-time factors, as in full context, of
{UTTERANCE_S:g} s. Second pass: {NUM_HYPOTHESES} hypotheses of {NUM_TOKENS} tokens over {UTTERANCE_S:g} s.

The layer sizes are ours, since the paper does not tell its own, and the weights are random; million parameters:
{{parameters}}.
"""
EXPORT_TEXT = """`u2moe export` made {name} from its checkpoint in {cpu_s:.0f} seconds of the processor,
with {gigabytes:.1f} GB of memory at its peak: {said}"""
ROUTING_TEXT = """Of {num_experts} experts of a layer, a chunk touches {even:.1f} evenly routed, the worst case: routers
without what all tokens share, and frames that are nothing alike. With their own random routers and people's speech it
is {own:.1f}; in the demo model, which was trained, {demo:.1f}. "Routed as the demo model" are the same weights with
{routed:.1f} experts to choose from, frames as before. Entropy of the loads, of 1: {entropies}."""

BOUND_TEXT = f"""Encoder in int8 on one thread, the models' own routers and people's speech,
{BOUND_S["bound-streaming"]:g} s streaming and {UTTERANCE_S:g} s in full context: milliseconds for
a chunk or for all,
quartiles of the whole in brackets, and how many times the bound. That is arithmetic or reading weights, whichever takes
longer, at the rates in the last row, measured with onnxruntime's kernels in the same run: G multiply-adds/s in int8 /
in float32 / GB/s."""
RATES = ("integer", "float", "read")
SKIP_TEXT = """With skipped experts (`u2moe quantize --skip-expert-below`), int8, one thread: where the second expert of
a token weighs less than {demo_below:g}, the demo model goes to the first alone. That is {demo_tokens:.0%} of its
tokens, for {cost:+.1%} word errors in full context (see below). Random weights weigh otherwise: below {below:g} as many
tokens skip theirs here, {tokens}. "Kept" is the time over that without skipping."""


def table(results: Results) -> str:
    """The results as Markdown."""
    millions = {name: number / 1e6 for name, number in results["parameters"].items()}
    parameters = ", ".join(f"{NAMES[name]} {number:.0f}" for name, number in millions.items())
    header = ("", "threads", *NAMES.values(), *(f"{_short_name(own)} / {NAMES[other]}" for own, other in RATIOS))
    rows = [
        _row(cell, cell_of(results, cell.mode, cell.precision, cell.num_threads))
        for cell in all_cells()
        if cell.key in results["cells"] and cell.mode in TITLES and cell.mode not in BOUNDS
    ]
    parts = (
        _paragraph(sentence(results)),
        *(_paragraph(text) for text in TEXT.format(parameters=parameters).split("\n\n")),
        *(_export(name, export) for name, export in results["exports"].items()),
        _routings(results["routings"]),
        "\n".join([f"| {' | '.join(header)} |", "|---" * len(header) + "|", *rows]),
        "\n".join(_skip_table(results)),
        "\n".join(_bound_table(results)),
        "\n".join(_start_table(results)),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _short_name(case: str) -> str:
    return "so routed" if case == AS_ROUTED else NAMES[case]


def _row(cell: Cell, measured: Mapping[str, Any]) -> str:
    shown = [_cell(spread(measured, cell.mode, name), cell.mode) if name in measured else "" for name in NAMES]
    ratios = [quartiles(ratio(measured, *pair)) if measured.keys() >= set(pair) else "" for pair in RATIOS]
    return f"| {cell.precision}, {TITLES[cell.mode]} | {cell.num_threads} | {' | '.join((*shown, *ratios))} |"


def _cell(item: Spread, mode: str) -> str:
    if mode == "second-pass":
        return f"{quartiles(item, 3)} s"
    return quartiles(item, 4)


def _export(name: str, export: Mapping[str, Any]) -> str:
    """What one command took, the comparison with torch included."""
    found = {"cpu_s": export["cpu_s"], "gigabytes": export["peak_bytes"] / 1e9, "said": export["said"]}
    return _paragraph(EXPORT_TEXT.format(name=NAMES[name], **found))


def _routings(routings: Mapping[str, Mapping[str, float]]) -> str:
    """How many experts a chunk touches, with random weights and with trained ones."""
    if not routings:
        return ""
    touched = {name: item["touched"] for name, item in routings.items()}
    text = ROUTING_TEXT.format(
        num_experts=routings[EVEN]["num_experts"],
        even=touched[EVEN],
        own=touched[OWN],
        demo=touched[DEMO],
        routed=touched[AS_DEMO],
        entropies=", ".join(f"{item['load_entropy']:.2f} {name}" for name, item in routings.items()),
    )
    return _paragraph(text)


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120)


def _skip_table(results: Results) -> list[str]:
    """Real-time factors with skipped experts, and what they are of those without and of the small model's."""
    modes = [mode for mode in ("streaming", "streaming-8", "full") if cell_of(results, mode).keys() >= SKIPPED.keys()]
    if not modes:
        return []
    skipping = results["skipping"]
    text = SKIP_TEXT.format(
        **{f"demo_{name}": skipping[DEMO][name] for name in ("below", "tokens")},
        cost=skipping[DEMO]["cost"],
        below=skipping["below"],
        tokens=", ".join(f"{share:.0%} {how}" for how, share in skipping["tokens"].items()),
    )
    header = [part for _, how in SKIPPED.values() for part in (f"MoE-1B, {how}", "kept", "/ Dense-225M")]
    rows = []
    for mode in modes:
        cell = cell_of(results, mode)
        shown = [
            part
            for case, (plain, _) in SKIPPED.items()
            for part in (
                quartiles(spread(cell, mode, case), 4),
                quartiles(ratio(cell, case, plain)),
                quartiles(ratio(cell, case, SMALL)),
            )
        ]
        rows.append(f"| {TITLES[mode]} | {' | '.join(shown)} |")
    return [_paragraph(text), "", f"|  | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|", *rows]


def _bound_table(results: Results) -> list[str]:
    """Times of the parts of the encoder over their bounds."""
    columns = [
        (
            f"{NAMES[name]}, {TITLES[mode]}",
            entry,
            1e3 * (CHUNK_S / entry["audio_s"] if mode == "bound-streaming" else 1),
        )
        for mode in BOUNDS
        for name, entry in cell_of(results, mode).items()
    ]
    if not columns:
        return []
    lines = [
        _paragraph(BOUND_TEXT),
        "",
        f"| part | {' | '.join(title for title, *_ in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for part in ENCODER_PARTS:
        found = [_times(entry["parts"].get(part), scale) for _, entry, scale in columns]
        lines.append(f"| {part.replace('_', ' ')} | {' | '.join(found)} |")
    whole = [
        f"{quartiles(_scaled(entry['stages']['encoder'], scale), 1)}, {encoder_ratio(entry).median:.2f}"
        for _, entry, scale in columns
    ]
    rates = [" / ".join(f"{entry['rates'][kind] / 1e9:.0f}" for kind in RATES) for _, entry, _ in columns]
    return [*lines, f"| whole | {' | '.join(whole)} |", f"| rates | {' | '.join(rates)} |"]


def _times(part: Mapping[str, Any] | None, scale: float) -> str:
    if part is None:
        return ""
    return short(scale * part["seconds"]) + (f", {part['ratio']:.2f}" if part["ratio"] else "")


def _start_table(results: Results) -> list[str]:
    """Load times and memory."""
    rows = []
    for precision in reversed(PRECISIONS):
        for name, item in cell_of(results, "start", precision).items():
            shown = [f"{item['disk']['files'] / 1e6:.0f}"]
            shown += [quartiles(_scaled(item[part], 1)) for part in ("verify_s", "load_s")]
            shown += [quartiles(_scaled(item[part], 1e-6), 0) for part in ("loaded_bytes", "peak_bytes")]
            rows.append(f"| {NAMES[name]}, {precision} | {' | '.join(shown)} |")
    header = "| fresh process, one thread | bundle, MB | sha256, s | sessions, s | memory then, MB | at its peak |"
    return [header, "|---|---|---|---|---|---|", *rows] if rows else []
