"""How far behind the speaker are committed words, and how many does the second pass revise?

    python -m u2moe.benchmarks.studies.committed BUNDLE TEST.tsv ...

docs/results/accuracy.md explains the delays. They are the same on every machine. `u2moe bench` also measures the
computation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from u2moe.benchmarks.bench.latency import summary
from u2moe.benchmarks.instruments.probe import Mode, Probe
from u2moe.benchmarks.results.files import publish
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.studies.shared.script import recognition_parser, script
from u2moe.runtime import Bundle
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import read_recordings

MODES = (Mode(chunk_size=16, num_left_chunks=4), Mode(chunk_size=8, num_left_chunks=4))
WAITS = ("word", "committed")
QUIET_S = 2.0  # Seconds of silence after each recording. An endpoint then ends the utterance, as in a conversation.


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return a table by set and chunk size, and the first set's median wait for a commitment and its share revised."""
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


@script
def main(argv: Sequence[str] | None = None) -> None:
    args = recognition_parser("committed", __doc__).parse_args(argv)
    probe = Probe(Bundle.open(args.bundle))
    sets: dict[str, dict[str, Any]] = {}
    for path in args.lists:
        recordings = [read_audio(item.path, probe.sample_rate) for item in read_recordings(path)]
        spoken = [np.pad(samples, (0, round(QUIET_S * probe.sample_rate))) for samples in recordings]
        sets[path.stem] = {}
        for mode in MODES:
            observed = [probe.recognise(samples, mode) for samples in spoken]
            found = summary(observed, probe.recognizer.vocabulary, probe.chunk_s(mode) or 0.0)
            # Percentiles, in seconds of audio, of the waits from a word's end until it is final, or committed
            waits = {name: found[f"{name}_s"]["algorithmic"] for name in WAITS}
            segments = [segment for item in observed for segment in item.segments]
            revised, num_words = sum(each.revised for each in segments), sum(len(each.words) for each in segments)
            sets[path.stem][str(mode.chunk_size)] = {**waits, "revised": revised, "words": num_words}
    publish(args.results, {"sets": sets}, values, bundle=args.bundle)
