"""How close is a bundle to the limit of the machine? Compares the time of each part with its bound.

docs/bench.md explains bounds. The measured time of a part includes normalisation, activations and copies; the bound
does not.
"""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from u2moe.benchmarks.instruments.operators import PARTS, PRODUCTS, UNCOUNTED, Kernel, profile
from u2moe.benchmarks.instruments.probe import Mode, Probe, Samples
from u2moe.benchmarks.instruments.rates import best_rate, read_rate
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, show_progress
from u2moe.runtime import Model, ctc_prefix_beam_search
from u2moe.runtime.model.features import fbank

_BEAM_SIZE = 10
_LARGE = 1 << 16
_STAGES = {"ctc": "ctc", "decoder": "rescoring"}  # of each graph except the encoder
_LOOKUPS = {"Gather", "GatherElements", "GatherND"}
_PROFILES = 3  # Maximum number of profiled runs. A profile grows by one line per kernel and run.


def measure_bound(
    probes: Mapping[str, Probe], samples: Samples, mode: Mode, rates: Mapping[str, Any], *, repetitions: int = 5
) -> list[dict[str, Any]]:
    """Measure the time of each part of each bundle for one utterance, and compute its lower bound.

    `probes` are bundles by name, which take turns. They use the number of threads in `rates`, from `measure_rates`.
    `samples` are at the models' sample rate. The result has an entry for each bundle, with the keys of `compare`.
    """
    runs = {name: utterance(probe, samples, mode) for name, probe in probes.items()}

    def stages_of(name: str) -> dict[str, float]:
        probes[name].watch.reset()
        runs[name](probes[name].model)
        return dict(probes[name].watch.seconds)

    cases = {name: partial(stages_of, name) for name in probes}
    measured = interleaved(cases, repetitions, title=f"bound, {mode.name}")
    entries = []
    for name, probe in probes.items():
        show_progress(f"bound, {mode.name}: profile of {name}")
        num_threads, num_rounds = int(rates["threads"]), min(repetitions, _PROFILES)
        profiled = partial(profile, probe.bundle, runs[name], num_threads=num_threads, repetitions=num_rounds)
        rounds = profiled(probe.kernels)
        counted = profiled({}) if probe.model.kernels.native else rounds
        stages = {stage: [seconds.get(stage, 0.0) for seconds in measured[name]] for stage in measured[name][0]}
        best = {kind: best_rate(rates, kind) for kind in ("integer", "float")}
        best["read"] = read_rate(rates, sum(file.size for file in probe.bundle.manifest.files.values()))
        audio_s = len(samples) / probe.sample_rate
        about = {"bundle": name, "mode": mode.name, "threads": rates["threads"], "audio_s": audio_s}
        entries.append({**about, **compare(rounds, stages, best, counted[0])})
    return entries


def utterance(probe: Probe, samples: Samples, mode: Mode) -> Callable[[Model], None]:
    """Return a function that runs every graph of a model for one utterance: chunk by chunk, then the second pass."""
    frames = fbank(samples, probe.bundle.manifest.features)

    def run(model: Model) -> None:
        output = model.encode(frames, mode.chunk_size, mode.num_left_chunks)
        size = mode.chunk_size or len(output)
        log_probs = [model.ctc(output[start : start + size]) for start in range(0, len(output), size)]
        if model.has_decoder:
            hypotheses = ctc_prefix_beam_search(np.concatenate(log_probs), _BEAM_SIZE, model.config.blank)
            model.token_scores(output, [item.tokens for item in hypotheses])

    return run


def compare(
    rounds: Sequence[Sequence[Kernel]],
    stages: Mapping[str, Sequence[float]],
    rates: Mapping[str, float],
    counted: Sequence[Kernel] | None = None,
) -> dict[str, Any]:
    """Compute the time and the bound of each part. docs/bench.md explains the entries of the result.

    The profiler adds about the same time to each kernel. `stages`, measured without the profiler, are the real times of
    the graphs. The times of all kernels of a stage are therefore reduced by the same amount, so that they add up to the
    time of the stage.

    Args:
        rounds: kernels of several identical runs; the time of each kernel is its median over the runs.
        stages: seconds of "encoder", "ctc" and "rescoring", measured several times.
        rates: multiply-adds per second of "integer" and "float" products, and bytes per second of "read".
        counted: kernels whose work is counted. They come from a run without native kernels, because products inside
            native kernels cannot be counted. None: use `rounds`.
    """
    profiled, kernels = defaultdict[str, list[Kernel]](list), list[Kernel]()
    for same in zip(*rounds, strict=True):
        kernel = replace(same[0], seconds=statistics.median(each.seconds for each in same))
        profiled[_STAGES.get(kernel.part, "encoder")].append(kernel)
    for stage, seconds in stages.items():
        kernels += without_profiler(profiled[stage], seconds)
    work = rounds[0] if counted is None else counted
    parts = {}
    for part in PARTS:
        if own := [item for item in kernels if item.part == part]:
            parts[part] = _part(own, [item for item in work if item.part == part], rates)
    spread = Spread.of([sum(seconds) for seconds in zip(*stages.values(), strict=True)])
    least_s = sum(part["least_s"] for part in parts.values())
    whole = {"seconds": spread.data(), "least_s": least_s, "ratio": spread.median / least_s if least_s else None}
    spreads = {stage: Spread.of(seconds).data() for stage, seconds in stages.items()}
    shares = {"operators": _shares(kernels, [item.op_type for item in kernels])}
    products = [item.part == "other" and item.multiply_adds > 0 for item in work]
    scopes = [re.sub(r"\d+", "*", item.scope) if known else None for item, known in zip(work, products, strict=True)]
    large = [item.parameter_bytes >= _LARGE and item.op_type not in _LOOKUPS | PRODUCTS for item in work]
    others = [item.op_type if own or item.op_type in UNCOUNTED else None for item, own in zip(work, large, strict=True)]
    found = {"rates": dict(rates), "parts": parts, "stages": spreads, "whole": whole}
    return {**found, **shares, "unknown": _shares(work, scopes), "not_counted": _shares(work, others)}


def without_profiler(kernels: Sequence[Kernel], measured: Sequence[float]) -> list[Kernel]:
    """Change all durations by the same amount, but not below 0, so that their sum is the median of `measured`."""
    if not kernels:
        return []
    seconds, total = np.array([kernel.seconds for kernel in kernels]), statistics.median(measured)
    ordered = np.sort(seconds)
    # For every k, compute the shift for which the k shortest times become 0. Use the first shift that makes no other
    # time negative.
    shifts = (total - ordered[::-1].cumsum()[::-1]) / np.arange(len(ordered), 0, -1)
    shift = shifts[np.argmax(ordered + shifts >= 0)]
    return [replace(kernel, seconds=max(kernel.seconds + float(shift), 0.0)) for kernel in kernels]


def _part(kernels: Sequence[Kernel], work: Sequence[Kernel], rates: Mapping[str, float]) -> dict[str, Any]:
    """Return the time and the bound of one part. The time is that of `kernels`; the bound is computed from `work`."""
    integer = sum(kernel.multiply_adds for kernel in work if kernel.integer)
    floating = sum(kernel.multiply_adds for kernel in work if not kernel.integer)
    num_bytes, seconds = sum(kernel.num_bytes for kernel in work), sum(kernel.seconds for kernel in kernels)
    arithmetic_s, read_s = integer / rates["integer"] + floating / rates["float"], num_bytes / rates["read"]
    least_s = max(arithmetic_s, read_s)
    return {
        "seconds": seconds, "least_s": least_s, "ratio": seconds / least_s if least_s else None,
        "arithmetic_s": arithmetic_s, "read_s": read_s,
        "integer_multiply_adds": integer, "float_multiply_adds": floating, "bytes": num_bytes,
    }  # fmt: skip


def _shares(kernels: Sequence[Kernel], names: Sequence[str | None]) -> dict[str, float]:
    """Return each name's share of the total time, largest first. Kernels whose name is None count only in the total."""
    seconds, total = defaultdict[str, float](float), sum(kernel.seconds for kernel in kernels) or 1.0
    for kernel, name in zip(kernels, names, strict=True):
        if name is not None:
            seconds[name] += kernel.seconds
    return {name: seconds[name] / total for name in sorted(seconds, key=lambda name: -seconds[name])}
