"""How far behind the speaker are committed words, and how many does the second pass revise?

    python -m u2moe.benchmarks.studies.committed BUNDLE TEST.tsv ...

Delays count only the audio that arrives after a word, not the time for computation. They are therefore the same on
every machine. `u2moe bench` also measures the computation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from u2moe.benchmarks.bench.latency import summary
from u2moe.benchmarks.instruments.probe import Mode, Observation, Probe
from u2moe.benchmarks.results.files import publish
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.studies.shared.script import recognition_parser, run_script
from u2moe.runtime import Bundle
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import read_recordings

MODES = (Mode(chunk_size=16, num_left_chunks=4), Mode(chunk_size=8, num_left_chunks=4))
WAITS = ("word", "committed")
QUIET_S = 2.0
"""Seconds of silence after each recording. An endpoint then ends the utterance, as in a conversation."""


def delays(observed: Sequence[Observation], probe: Probe, mode: Mode) -> dict[str, Any]:
    """Return percentiles of two waits after a word's end: until its text is final and until it is committed.

    They are in seconds of audio. Also return the numbers of words and of revised words.
    """
    found = summary(observed, probe.recognizer.vocabulary, probe.chunk_s(mode) or 0.0)
    waits = {name: found[f"{name}_s"]["algorithmic"] for name in WAITS}
    segments = [segment for item in observed for segment in item.segments]
    num_words = sum(len(each.words) for each in segments)
    return {**waits, "revised": sum(each.revised for each in segments), "words": num_words}


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for pages: a table by set and chunk size, and values of the first set for each chunk size.

    The latter are the median wait until a word is committed, and the share of revised words.
    """
    header = ("set", "chunk", "final text shown, p50, p95", "committed, p50, p95", "revised")
    rows, numbers = list[Sequence[object]](), dict[str, str]()
    for name, modes in results["sets"].items():
        for size, found in modes.items():
            waits = [f"{1000 * found[wait]['p50']:.0f}, {1000 * found[wait]['p95']:.0f} ms" for wait in WAITS]
            share = f"{found['revised'] / found['words']:.1%}"
            rows.append((name, size, *waits, share))
            numbers.setdefault(f"median_{size}", f"{found['committed']['p50']:.2f}")
            numbers.setdefault(f"revised_{size}", share)
    return {"table": table(header, rows), **numbers}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = recognition_parser("committed", __doc__).parse_args(argv)
    probe = Probe(Bundle.open(args.bundle))
    sets: dict[str, dict[str, Any]] = {}
    for path in args.lists:
        recordings = [read_audio(item.path, probe.sample_rate) for item in read_recordings(path)]
        spoken = [np.pad(samples, (0, round(QUIET_S * probe.sample_rate))) for samples in recordings]
        found = {mode: [probe.recognise(samples, mode) for samples in spoken] for mode in MODES}
        sets[path.stem] = {str(mode.chunk_size): delays(own, probe, mode) for mode, own in found.items()}
    publish(args.results, {"sets": sets}, values, bundle=args.bundle)


if __name__ == "__main__":
    run_script(main)
