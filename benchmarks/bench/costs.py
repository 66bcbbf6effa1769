"""The cost of each bundle relative to the first: parameters, bytes, and time by kind of work."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from u2moe.benchmarks.bench.terminal import Report, table
from u2moe.benchmarks.instruments import workload
from u2moe.benchmarks.instruments.probe import Mode, Probe, Samples
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, timed
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_CHUNKS, NUM_STREAMS
from u2moe.quantize.picture import bar_picture
from u2moe.runtime.model.features import fbank

WORK = {"streaming": f"chunks of {CHUNK_SIZE}", "streaming-8": f"batch of {NUM_STREAMS}"}
WORK |= {"full": "full context", "second-pass": "second pass"}  # titles of the work of `workload.one_round`


def measure_costs(probes: Mapping[str, Probe], recordings: Sequence[Samples], repetitions: int) -> dict[str, Any]:
    """Measure encoder with CTC head, and second pass, without features and search. The bundles take turns.

    Return, by bundle, `work`, the real-time factors of supported work, and `parameters` (None if weights are packed,
    the shape is fixed or the extra [tools] is not installed): their `total` number and the number `active` for one
    token.
    """
    found: dict[str, Any] = {name: {"parameters": None, "work": {}} for name in probes}
    for name, probe in probes.items():
        if find_spec("onnx_ir") is not None and probe.model.config.static is None:
            from u2moe.quantize.inspection import count_parameters  # noqa: PLC0415 - needs the extra tools

            found[name]["parameters"] = count_parameters(probe.bundle)
    for kind, title in WORK.items():
        able = {name: made for name, probe in probes.items() if (made := _round(probe, recordings, kind))}
        seconds = interleaved({name: timed(run) for name, (run, _) in able.items()}, repetitions, title=title)
        for name, own in seconds.items():
            found[name]["work"][kind] = Spread.of([value / able[name][1] for value in own]).data()
    return found


def _round(probe: Probe, recordings: Sequence[Samples], kind: str) -> tuple[workload.Run, float] | None:
    """Return a function that runs a round of a kind of work, and a round's seconds of audio; None if unsupported."""
    config, manifest, fixed = probe.model.config, probe.bundle.manifest, Mode.fixed(probe.model.config)
    is_able = config.streaming and config.whole_chunk(CHUNK_SIZE) == CHUNK_SIZE
    if fixed is not None:
        is_able = kind == "streaming" and fixed == Mode(chunk_size=CHUNK_SIZE, num_left_chunks=workload.NUM_LEFT_CHUNKS)
    if not {"full": fixed is None, "second-pass": probe.model.has_decoder}.get(kind, is_able):
        return None
    chunk_s, num_chunks = CHUNK_SIZE * manifest.frame_s, NUM_CHUNKS.get(kind, 0)
    least_s = (workload.NUM_WARM_CHUNKS + num_chunks + 2) * chunk_s if num_chunks else 0
    audio_s = max(workload.UTTERANCE_S, least_s)
    samples = np.resize(np.concatenate(recordings), round(audio_s * probe.sample_rate))
    run = workload.one_round(kind, probe.model, fbank(samples, manifest.features))
    return run, num_chunks * chunk_s * (NUM_STREAMS if kind == "streaming-8" else 1) or audio_s


def costs_of(report: Report) -> dict[str, dict[str, tuple[float, float]]]:
    """Return each known cost and its ratio to the first bundle's cost, by title (with the unit) and bundle."""
    bundles = list(report["bundles"])
    values: dict[str, dict[str, float]] = defaultdict(dict)
    for name in bundles:
        entry, footprint = report["costs"][name], report["footprint"][name]
        for kind, number in (entry["parameters"] or {}).items():
            values[f"{'parameters' if kind == 'total' else kind}, M"][name] = number / 1e6
        values["files, MB"][name] = footprint["disk"]["files"] / 1e6
        if "peak_bytes" in footprint:
            values["memory, MB"][name] = footprint["peak_bytes"]["median"] / 1e6
        for kind, own in entry["work"].items():
            values[f"{WORK[kind]}, RTF"][name] = own["median"]
    return {
        title: {name: (value, value / found[bundles[0]]) for name, value in found.items()}
        for title, found in values.items()
        if bundles[0] in found
    }


def costs_table(report: Report) -> list[str]:
    """Return a table of each bundle's costs, with the ratios to the first bundle's costs in brackets."""
    found, rows = costs_of(report), []
    for name in report["bundles"]:
        own = [found[title].get(name) for title in found]
        rows.append([name, *("-" if cost is None else f"{cost[0]:.3g} ({cost[1]:.2f})" for cost in own)])
    title = "Costs, and ratios to the first bundle (RTF: seconds per second of speech, without search)"
    return [title, *table(["bundle", *found], rows)]


def costs_picture(report: Report) -> str:
    """Return a bar chart of the costs of each bundle, relative to the first bundle."""
    names, rows = list(report["bundles"]), []
    for title, found in costs_of(report).items():
        bars = [(names.index(name), share, f"{share:.2f} ({value:.3g})") for name, (value, share) in found.items()]
        rows.append((title, bars))
    return bar_picture(f"Costs relative to {names[0]} (values): less is better", names, rows)
