"""How fast is a bundle end to end, and where does the time go? Several bundles in turn, in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from u2moe.benchmarks.listening import STAGES, Heard, Instrument, Mode, Samples
from u2moe.benchmarks.measurement import Spread, interleaved, percentiles

CHUNK_SIZES = (16, 8, 4)
LEFT_CHUNKS = (4, -1)


def modes_of(instrument: Instrument, chunk_sizes: Sequence[int] = CHUNK_SIZES) -> list[Mode]:
    """Full context, and every chunk size with bounded and with all left context, as far as the bundle can."""
    config = instrument.model.config
    modes = [Mode()]
    if config.streaming:
        modes += [Mode(chunk_size=size, num_left_chunks=left) for size in chunk_sizes for left in LEFT_CHUNKS]
    return modes


def measure_speed(
    instruments: Mapping[str, Instrument],
    recordings: Sequence[Samples],
    modes: Mapping[str, Sequence[Mode]],
    *,
    repetitions: int = 5,
    warm_up: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Hear all recordings in every mode, the bundles in turn.

    Args:
        instruments: loaded bundles by name.
        recordings: samples at the rate of the models.
        modes: what each of them shall be measured in.
        repetitions: how often each is measured.
        warm_up: rounds before those, which do not count.
        progress: called with a line for each round.

    Returns:
        One entry for each mode and bundle; see `summary`.
    """

    def case(instrument: Instrument, mode: Mode) -> Callable[[], list[Heard]]:
        return lambda: [instrument.hear(samples, mode) for samples in recordings]

    entries = []
    for mode in dict.fromkeys(mode for own in modes.values() for mode in own):
        cases = {name: case(item, mode) for name, item in instruments.items() if mode in modes[name]}
        heard = interleaved(cases, repetitions, warm_up=warm_up, title=mode.name, progress=progress)
        entries += [
            {"bundle": name, "mode": mode.name, **summary(rounds, instruments[name].chunk_s(mode))}
            for name, rounds in heard.items()
        ]
    return entries


def summary(rounds: Sequence[Sequence[Heard]], chunk_s: float | None) -> dict[str, Any]:
    """What the rounds of one mode gave.

    Returns:
        real_time_factor: seconds of the runtime's calls per second of audio, each round over all recordings.
        core_hours_per_hour: processor seconds, of all threads, per second of audio.
        shares: of the time by stage, the median of the rounds each.
        finalisation_s: from the end of the input to the final result, of every recording in every round.
        chunk_latency_s, chunk_budget_s: percentiles at full speed over the chunks of all rounds, and the seconds from
            one chunk to the next; without chunks they are missing.
    """
    factors, core_hours, shares = [], [], []
    for recordings in rounds:
        audio_s = sum(heard.audio_s for heard in recordings)
        wall_s = sum(heard.wall_s for heard in recordings)
        factors.append(wall_s / audio_s)
        core_hours.append(sum(heard.cpu_s for heard in recordings) / audio_s)
        shares.append({stage: sum(heard.stages[stage] for heard in recordings) / wall_s for stage in STAGES})
    entry: dict[str, Any] = {
        "real_time_factor": Spread.of(factors).data(),
        "core_hours_per_hour": Spread.of(core_hours).data(),
        "shares": {stage: Spread.of([share[stage] for share in shares]).median for stage in STAGES},
        "finalisation_s": percentiles([heard.final_s for recordings in rounds for heard in recordings]),
    }
    latencies = [event.compute_s for recordings in rounds for heard in recordings for event in heard.events]
    if chunk_s is not None and latencies:
        entry["chunk_latency_s"] = percentiles(latencies)
        entry["chunk_budget_s"] = chunk_s
    return entry
