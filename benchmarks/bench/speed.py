"""Speed of bundles, end to end and by stage."""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from u2moe.benchmarks.instruments.host import EnergyMeter
from u2moe.benchmarks.instruments.probe import STAGES, Mode, Observation, Probe, Samples
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, percentiles
from u2moe.runtime.text.word_errors import edit_distance, words


def measure_speed(
    probes: Mapping[str, Probe],
    recordings: Sequence[Samples],
    modes: Mapping[str, Sequence[Mode]],
    *,
    transcripts: Sequence[str] = (),
    repetitions: int = 5,
) -> list[dict[str, Any]]:
    """Recognise recordings in every mode, in turn. Return entries by mode and bundle; docs/bench.md explains them."""
    meter = EnergyMeter()

    def measure(probe: Probe, mode: Mode) -> tuple[list[Observation], float | None]:
        meter.joules()
        return [probe.recognise(samples, mode) for samples in recordings], meter.joules()

    entries: list[dict[str, Any]] = []
    for mode in dict.fromkeys(mode for own in modes.values() for mode in own):
        cases = {name: partial(measure, item, mode) for name, item in probes.items() if mode in modes[name]}
        for name, results in interleaved(cases, repetitions, title=mode.name).items():
            rounds = [observed for observed, _ in results]
            entry = {"bundle": name, "mode": mode.name, **summary(rounds, probes[name].chunk_s(mode))}
            entry |= energy(results) if not meter.missing else dict.fromkeys(("energy_wh_per_hour", "words_per_joule"))
            entry["energy_missing"] = meter.missing or None
            if any(transcripts):
                entry["words"] = word_errors(rounds[0], transcripts)
            entries.append(entry)
    return entries


def energy(rounds: Sequence[tuple[Sequence[Observation], float | None]]) -> dict[str, Any]:
    """Return spreads of watt-hours per hour of audio (equal to joules per second), and of words per joule."""
    per_second, per_joule = list[float](), list[float]()
    for observed, joules in rounds:
        per_second.append((joules or 0.0) / sum(item.audio_s for item in observed))
        if joules:
            per_joule.append(sum(len(segment.words) for item in observed for segment in item.segments) / joules)
    of_words = Spread.of(per_joule).data() if per_joule else None
    return {"energy_wh_per_hour": Spread.of(per_second).data(), "words_per_joule": of_words}


def summary(rounds: Sequence[Sequence[Observation]], chunk_s: float | None) -> dict[str, Any]:
    """Summarise the rounds of one mode. docs/bench.md explains the entries. Those of chunks may be missing."""
    audio_s = sum(observed.audio_s for observed in rounds[0])
    costs = [[{**vars(observed), **observed.stages} for observed in recordings] for recordings in rounds]

    def factor(name: str) -> Spread:
        return Spread.of([sum(cost[name] for cost in recordings) / audio_s for recordings in costs])

    stages = {stage: factor(stage) for stage in STAGES}
    total = sum(stage.median for stage in stages.values())
    entry: dict[str, Any] = {
        "real_time_factor": factor("wall_s").data(),
        "seconds": [round(cost["wall_s"], 7) for recordings in costs for cost in recordings],
        "core_hours_per_hour": factor("cpu_s").data(),
        "stages": {stage: found.data() for stage, found in stages.items()},
        "shares": {stage: found.median / total for stage, found in stages.items()},
        "finalisation_s": latencies([[observed.final_s for observed in recordings] for recordings in rounds]),
    }
    chunks = [[event.compute_s for observed in recordings for event in observed.events] for recordings in rounds]
    if chunk_s is not None and all(chunks):
        entry |= {"chunk_latency_s": latencies(chunks, chunk_s), "chunk_budget_s": chunk_s}
    return entry


def latencies(rounds: Sequence[Sequence[float]], budget_s: float | None = None) -> dict[str, Any]:
    """Return percentiles of all, `rounds`, the spread of their medians, and `late`, the share above `budget_s`."""
    every = [seconds for found in rounds for seconds in found]
    late = {} if budget_s is None else {"late": sum(seconds > budget_s for seconds in every) / len(every)}
    return {**percentiles(every), **late, "rounds": Spread.of(list(map(statistics.median, rounds))).data()}


def word_errors(observed: Sequence[Observation], transcripts: Sequence[str]) -> dict[str, Any]:
    """Return `errors` and `lengths` in words of each recording with a transcript, and their `num_words` and `rate`."""
    pairs = [(words(text), words(item.text)) for item, text in zip(observed, transcripts, strict=True) if text]
    errors, lengths = [edit_distance(*pair) for pair in pairs], [len(expected) for expected, _ in pairs]
    rate = sum(errors) / sum(lengths) if sum(lengths) else 0.0
    return {"num_words": sum(lengths), "rate": rate, "errors": errors, "lengths": lengths}
