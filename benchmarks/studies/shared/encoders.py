"""Encoders beside the bound of the machine, and what fresh processes take."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from u2moe.benchmarks.bench.bound import measure_bound
from u2moe.benchmarks.bench.footprint import measure_footprint
from u2moe.benchmarks.instruments.probe import Mode, Probe
from u2moe.benchmarks.instruments.rates import measure_rates
from u2moe.benchmarks.instruments.statistics import spread_of
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS, UTTERANCE_S, speech
from u2moe.benchmarks.studies.shared.programs import write_wav
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.model.settings import SessionSettings

BOUNDS = {"streaming": (Mode(chunk_size=CHUNK_SIZE, num_left_chunks=NUM_LEFT_CHUNKS), 4.0), "full": (Mode(), 10.0)}
"""Context, and seconds of speech: a profile has a line for each kernel of each chunk."""
PARTS = ("subsampling", "feed_forward", "attention", "convolution", "other")
START = ("verify_s", "load_s", "loaded_bytes", "peak_bytes")


def bounds_of(
    probes: Mapping[str, Probe], mode: str, repetitions: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """By name the `ms` of the encoder for a second of speech, and the `ratio` of its time to the bound of its parts.

    One thread, the models' own routers, recorded speech.
    """
    sizes = sorted({sum(file.size for file in probe.bundle.manifest.files.values()) for probe in probes.values()})
    rates = measure_rates(sizes, 1, repetitions=repetitions, progress=progress)
    context, seconds = BOUNDS[mode]
    samples = speech(seconds, next(iter(probes.values())).sample_rate)
    entries = measure_bound(probes, samples, context, rates, repetitions=repetitions, progress=progress)
    return {entry["bundle"]: bound_of(entry) for entry in entries}


def bound_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an entry of `measure_bound` that goes into results."""
    least_s = sum(entry["parts"][name]["least_s"] for name in PARTS if name in entry["parts"])
    encoder = entry["stages"]["encoder"]
    return {
        "ms": spread_of(encoder, 1e3 / entry["audio_s"]).data(),
        "ratio": spread_of(encoder, 1 / least_s).data(),
    }


def starts_of(bundles: Mapping[str, Bundle], kernels: str, repetitions: int) -> dict[str, Any]:
    """By name the spreads of `START` in fresh processes, and the bytes of all `files`."""
    rate = next(iter(bundles.values())).manifest.features.sample_rate
    with tempfile.TemporaryDirectory() as folder:
        audio = write_wav(Path(folder) / "speech.wav", speech(UTTERANCE_S, rate), rate)
        found = measure_footprint(bundles, audio, settings=SessionSettings(kernels=kernels), repetitions=repetitions)
    return {name: start_of(item) for name, item in found.items()}


def start_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a report of `measure_footprint` that goes into results."""
    return {**{name: item[name] for name in START}, "files": item["disk"]["files"]}
