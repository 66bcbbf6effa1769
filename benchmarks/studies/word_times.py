"""How accurate are word times? On speech with known word boundaries, with full context and in chunks.

    python -m u2moe.benchmarks.studies.word_times BUNDLE WORDS.tsv ...

Isolated words (a manifest with one word per recording) are joined with pauses of known length: a word begins and ends
where its recording becomes loud and quiet. The times of recognised words are compared with these, in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.results.files import publish
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.studies.shared.script import recognition_parser, run_script
from u2moe.runtime import DecodingOptions, Recognizer, WordResult
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.text.word_errors import matches, words

RATE = 16_000
STREAMED = DecodingOptions(chunk_size=16, num_left_chunks=4)
CONDITIONS = {"full": DecodingOptions(), "chunk 16": STREAMED}
WORDS_PER_UTTERANCE = 5
PAUSES_S = (0.05, 0.6)
_STEP_S = 0.01
_QUIET = 0.01
"""A word lasts from the first to the last 10 ms above this fraction of its loudest 10 ms: 40 dB below."""
_NOISE = 1e-4
"""Standard deviation of the noise in pauses: no microphone records digital silence."""


JoinedWords = tuple[npt.NDArray[np.float32], list[WordResult]]
"""Samples at 16 kHz and the words in them."""


def join_words(recordings: Sequence[Recording], num_utterances: int, seed: int = 0) -> list[JoinedWords]:
    """Recordings of single words, drawn at random and joined with pauses of quiet noise."""
    random = np.random.default_rng(seed)
    clips = [(read_audio(item.path, RATE), item.transcript) for item in recordings if len(words(item.transcript)) == 1]
    utterances = []
    for _ in range(num_utterances):
        parts, spoken, time = [], [], 0.0
        for position in random.integers(len(clips), size=WORDS_PER_UTTERANCE).tolist():
            clip, word = clips[position]
            pause = np.zeros(int(random.uniform(*PAUSES_S) * RATE), np.float32)
            time += len(pause) / RATE
            start, end = loud_part(clip)
            spoken.append(WordResult(word=word, start=time + start, end=time + end, confidence=None))
            time += len(clip) / RATE
            parts += [pause, clip]
        samples = np.concatenate([*parts, np.zeros(RATE // 2, np.float32)])
        noise = _NOISE * random.standard_normal(len(samples))
        utterances.append((samples + noise.astype(np.float32), spoken))
    return utterances


def loud_part(samples: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Start and end in seconds of the part of a recording that is louder than 1 % of its loudest 10 ms."""
    step = int(_STEP_S * RATE)
    whole = samples[: len(samples) // step * step].reshape(-1, step)
    loudness = np.sqrt((whole.astype(np.float64) ** 2).mean(axis=1))
    loud = np.flatnonzero(loudness > _QUIET * loudness.max())
    return float(loud[0]) * _STEP_S, float(loud[-1] + 1) * _STEP_S


def compare(recognizer: Recognizer, utterances: Iterable[JoinedWords], options: DecodingOptions) -> dict[str, Any]:
    """Timing errors of the words that were recognised."""
    starts: list[float] = []
    ends: list[float] = []
    num_words = 0
    for samples, spoken in utterances:
        found = [word for segment in recognizer.transcribe(samples, options=options).segments for word in segment.words]
        num_words += len(spoken)
        spelled = [[words(word.word) for word in side] for side in (spoken, found)]
        for expected, position in matches(*spelled):
            starts.append(found[position].start - spoken[expected].start)
            ends.append(found[position].end - spoken[expected].end)
    return {
        "num_words": num_words, "num_recognised": len(starts), "start": statistics(starts), "end": statistics(ends),
    }  # fmt: skip


def statistics(errors_s: Sequence[float]) -> dict[str, float] | None:
    """Errors in milliseconds: signed mean, and median and 90th percentile of their magnitudes."""
    if not errors_s:
        return None
    errors = 1000 * np.asarray(errors_s)
    sizes = np.abs(errors)
    figures = {
        "bias_ms": errors.mean(), "median_ms": np.median(sizes),
        "p90_ms": np.percentile(sizes, 90),
    }  # fmt: skip
    return {name: round(float(value), 1) for name, value in figures.items()}


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Values for the pages: a row for each set and condition, and the numbers of the first."""
    measured = [
        (name, condition, found)
        for name, conditions in results["sets"].items()
        for condition, found in conditions.items()
        if found["start"]
    ]
    rows = [
        (
            name, condition, f"{found['num_recognised']} of {found['num_words']}",
            *(f"{found[edge]['median_ms']:.0f}, {found[edge]['p90_ms']:.0f} ms" for edge in ("start", "end")),
            f"{found['start']['bias_ms']:+.0f}, {found['end']['bias_ms']:+.0f} ms",
        )
        for name, condition, found in measured
    ]  # fmt: skip
    header = ("speech", "context", "words recognised", "start: median, 90 %", "end: median, 90 %", "bias of start, end")
    numbers = {f"{edge}_{kind}": f"{measured[0][2][edge][f'{kind}_ms']:.0f}" for edge in ("start", "end")
               for kind in ("median", "p90")} if measured else {}  # fmt: skip
    return {"table": table(header, rows), **numbers}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = recognition_parser("word_times", __doc__)
    parser.add_argument("--utterances", type=int, default=100, help="of each set (default: 100)")
    args = parser.parse_args(argv)
    recognizer = Recognizer.from_pretrained(args.bundle)
    sets = {path.stem: join_words(read_recordings(path), args.utterances) for path in args.lists}
    found = {
        name: {condition: compare(recognizer, spoken, options) for condition, options in CONDITIONS.items()}
        for name, spoken in sets.items()
    }
    publish(args.results, {"sets": found}, values, bundle=args.bundle)


if __name__ == "__main__":
    run_script(main)
