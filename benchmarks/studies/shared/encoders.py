"""Encoders beside the bound of the machine, and what fresh processes take: the same for all full-size studies."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from u2moe.benchmarks.bench.bound import measure_bound
from u2moe.benchmarks.bench.footprint import measure_footprint
from u2moe.benchmarks.instruments.probe import Mode, Probe
from u2moe.benchmarks.instruments.rates import measure_rates
from u2moe.benchmarks.instruments.statistics import Spread, spread_of
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS, UTTERANCE_S, speech
from u2moe.benchmarks.results.markdown import quartiles
from u2moe.benchmarks.studies.shared.process import write_wav
from u2moe.runtime.bundle.bundle import Bundle
from u2moe.runtime.model.settings import SessionSettings

BOUNDS = {"streaming": (Mode(chunk_size=CHUNK_SIZE, num_left_chunks=NUM_LEFT_CHUNKS), 4.0), "full": (Mode(), 10.0)}
"""Context, and seconds of speech: a profile has a line for each kernel of each chunk."""
PARTS = ("subsampling", "feed_forward", "attention", "convolution", "other")
START_HEADER = ("bundle, MB", "sha256, s", "sessions, s", "memory then, MB", "at its peak")


def bounds_of(
    probes: Mapping[str, Probe], mode: str, repetitions: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Entries of `measure_bound` by name: one thread, the models' own routers, recorded speech."""
    sizes = sorted({sum(file.size for file in probe.bundle.manifest.files.values()) for probe in probes.values()})
    rates = measure_rates(sizes, 1, repetitions=repetitions, progress=progress)
    context, seconds = BOUNDS[mode]
    samples = speech(seconds, next(iter(probes.values())).sample_rate)
    entries = measure_bound(probes, samples, context, rates, repetitions=repetitions, progress=progress)
    return {entry["bundle"]: entry for entry in entries}


def starts_of(bundles: Mapping[str, Bundle], kernels: str, repetitions: int) -> dict[str, Any]:
    """Reports of `measure_footprint` by name."""
    rate = next(iter(bundles.values())).manifest.features.sample_rate
    with tempfile.TemporaryDirectory() as folder:
        audio = write_wav(Path(folder) / "speech.wav", speech(UTTERANCE_S, rate), rate)
        return measure_footprint(bundles, audio, settings=SessionSettings(kernels=kernels), repetitions=repetitions)


def start_row(item: Mapping[str, Any]) -> list[str]:
    """What stands below `START_HEADER`."""
    times = [quartiles(spread_of(item[part])) for part in ("verify_s", "load_s")]
    sizes = [quartiles(spread_of(item[part], 1e-6), 0) for part in ("loaded_bytes", "peak_bytes")]
    return [f"{item['disk']['files'] / 1e6:.0f}", *times, *sizes]


def parts_of(entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The parts of an entry of `measure_bound` that belong to the encoder."""
    return {name: entry["parts"][name] for name in PARTS if name in entry["parts"]}


def bound_ratio(entry: Mapping[str, Any]) -> Spread:
    """Seconds of the encoder over the sum of the bounds of its parts."""
    least_s = sum(part["least_s"] for part in parts_of(entry).values())
    return spread_of(entry["stages"]["encoder"], 1 / least_s)
