"""How near is a bundle to what the machine can do? The least time of each part, and the time it takes.

The products that onnxruntime runs are counted (`kernels`), and so are the bytes of the weights, keys and values that
they read: of experts, those that have tokens. No part can take less time than its arithmetic at the best rate of the
machine, nor less than reading these bytes once per call (`rates`); the larger of the two is its bound. Everything else,
such as normalisation, activations and copies, is in the time that a part takes but not in its bound.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from u2moe.benchmarks.kernels import PARTS, Kernel, profile
from u2moe.benchmarks.listening import Instrument, Mode, Samples
from u2moe.benchmarks.measurement import Spread, interleaved
from u2moe.benchmarks.rates import best_rate, read_rate
from u2moe.runtime import Model, ctc_prefix_beam_search
from u2moe.runtime.encoder import Windows, required_cache_size
from u2moe.runtime.features import Fbank

_STAGES = {"ctc": "ctc", "decoder": "rescoring"}
"""Stage of `listening` that the graph of a part is timed as; other parts are those of the encoder."""
_BEAM_SIZE = 10
_LARGE = 1 << 16


def measure_bound(
    instruments: Mapping[str, Instrument],
    samples: Samples,
    mode: Mode,
    rates: Mapping[str, Any],
    *,
    repetitions: int = 5,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Times of one utterance and their bounds, the bundles in turn.

    Args:
        instruments: loaded bundles by name, all with the threads that `rates` were measured with.
        samples: one utterance, at the rate of the models.
        mode: how the encoder hears it.
        rates: of the machine, from `rates.measure_rates`.
        repetitions: how often each is measured.
        progress: called with a line for each round.

    Returns:
        One entry for each bundle; see `compare`.
    """

    def case(instrument: Instrument) -> Callable[[], dict[str, float]]:
        run = utterance(instrument, samples, mode)

        def timed() -> dict[str, float]:
            instrument.watch.reset()
            run(instrument.model)
            return dict(instrument.watch.seconds)

        return timed

    cases = {name: case(instrument) for name, instrument in instruments.items()}
    measured = interleaved(cases, repetitions, title=f"bound, {mode.name}", progress=progress)
    entries = []
    for name, instrument in instruments.items():
        progress(f"bound, {mode.name}: profile of {name}")
        kernels = profile(instrument.bundle, utterance(instrument, samples, mode), num_threads=int(rates["threads"]))
        stages = {stage: [seconds.get(stage, 0.0) for seconds in measured[name]] for stage in measured[name][0]}
        footprint = sum(file.size for file in instrument.bundle.manifest.files.values())
        entry = compare(kernels, stages, best_rates(rates, footprint))
        audio_s = len(samples) / instrument.sample_rate
        entries.append({"bundle": name, "mode": mode.name, "threads": rates["threads"], "audio_s": audio_s, **entry})
    return entries


def utterance(instrument: Instrument, samples: Samples, mode: Mode) -> Callable[[Model], None]:
    """A function that runs every graph of a model as for one utterance: chunk by chunk, and the second pass."""
    fbank = Fbank(instrument.bundle.manifest.features)
    frames = np.concatenate([fbank.accept(samples), fbank.finish()])

    def run(model: Model) -> None:
        windows = Windows(model.config, mode.chunk_size)
        windows.accept(frames)
        windows.finish()
        required = required_cache_size(mode.chunk_size or 1, mode.num_left_chunks)
        caches, outputs, log_probs = model.encoder.start(), [], []
        while (window := windows.take()) is not None:
            output, caches = model.encoder.step(window[np.newaxis], caches, required_cache_size=required)
            outputs.append(output[0])
            log_probs.append(model.ctc(output[0]))
        if model.has_decoder and outputs:
            hypotheses = ctc_prefix_beam_search(np.concatenate(log_probs), _BEAM_SIZE, model.config.blank)
            model.token_scores(np.concatenate(outputs), [item.tokens for item in hypotheses])

    return run


def best_rates(rates: Mapping[str, Any], footprint: int) -> dict[str, float]:
    """Multiply-adds per second of "integer" and "float" products, and bytes per second of "read" at a footprint."""
    kinds = {kind: best_rate(dict(rates), kind) for kind in ("integer", "float")}
    return {**kinds, "read": read_rate(dict(rates), footprint)}


def compare(
    kernels: Sequence[Kernel], stages: Mapping[str, Sequence[float]], rates: Mapping[str, float]
) -> dict[str, Any]:
    """Times and bounds by part.

    The profiler itself takes time: it says how a graph's time is shared among its parts, and `stages`, measured
    without it, how long the graph takes.

    Args:
        kernels: of one run.
        stages: seconds of "encoder", "ctc" and "rescoring", measured several times.
        rates: "integer", "float" and "read"; see `best_rates`.

    Returns:
        rates: as given.
        parts: by part: `seconds`; `least_s`, its bound, the larger of `arithmetic_s` and `read_s`; `ratio`, of seconds
            to bound; the counts behind it; and `share_of_products`, the part of its time that products took.
        whole: seconds, as a spread; the sum of the bounds; their ratio.
        operators: share of the time by operator, largest first.
        not_counted: operators that read large constants, but whose work is not known here: their part has no bound.
    """
    profiled = defaultdict[str, float](float)
    for kernel in kernels:
        profiled[_STAGES.get(kernel.part, "encoder")] += kernel.seconds
    medians = {stage: statistics.median(seconds) for stage, seconds in stages.items()}
    parts = {}
    for part in PARTS:
        own = [kernel for kernel in kernels if kernel.part == part]
        stage = _STAGES.get(part, "encoder")
        if own and profiled[stage] and stage in medians:
            parts[part] = _part(own, medians[stage] / profiled[stage], rates)
    totals = [sum(rounds) for rounds in zip(*stages.values(), strict=True)]
    least_s = sum(part["least_s"] for part in parts.values())
    spread = Spread.of(totals)
    return {
        "rates": dict(rates),
        "parts": parts,
        "whole": {"seconds": spread.data(), "least_s": least_s, "ratio": spread.median / least_s if least_s else None},
        "operators": _operators(kernels),
        "not_counted": sorted(
            {item.op_type for item in kernels if item.parameter_bytes >= _LARGE and not item.multiply_adds}
            - {"Gather", "MatMul", "Gemm"}
        ),
    }


def _part(kernels: Sequence[Kernel], scale: float, rates: Mapping[str, float]) -> dict[str, Any]:
    """Time and bound of the kernels of one part; `scale` takes profiled seconds to those without the profiler."""
    integer = sum(kernel.multiply_adds for kernel in kernels if kernel.integer)
    floating = sum(kernel.multiply_adds for kernel in kernels if not kernel.integer)
    num_bytes = sum(kernel.num_bytes for kernel in kernels)
    seconds = sum(kernel.seconds for kernel in kernels)
    products = sum(kernel.seconds for kernel in kernels if kernel.multiply_adds)
    arithmetic_s = integer / rates["integer"] + floating / rates["float"]
    read_s = num_bytes / rates["read"]
    least_s = max(arithmetic_s, read_s)
    return {
        "seconds": seconds * scale,
        "least_s": least_s,
        "ratio": seconds * scale / least_s if least_s else None,
        "arithmetic_s": arithmetic_s,
        "read_s": read_s,
        "integer_multiply_adds": integer,
        "float_multiply_adds": floating,
        "bytes": num_bytes,
        "share_of_products": products / seconds if seconds else 0.0,
    }


def _operators(kernels: Sequence[Kernel], limit: int = 12) -> dict[str, float]:
    seconds = defaultdict[str, float](float)
    for kernel in kernels:
        seconds[kernel.op_type] += kernel.seconds
    total = sum(seconds.values())
    largest = sorted(seconds, key=lambda op_type: -seconds[op_type])[:limit]
    return {op_type: seconds[op_type] / total for op_type in largest} if total else {}
