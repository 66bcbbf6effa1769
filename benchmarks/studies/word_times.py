"""How accurate are word times with full context and in chunks, on speech with known word boundaries?

    python -m u2moe.benchmarks.studies.word_times BUNDLE WORDS.tsv ... --sentences SENTENCES.tsv

Isolated words are joined with pauses of known length. A word begins where its recording becomes loud, and ends where it
becomes quiet. Sentences are joined into an hour of audio. `align` should find each word at the same time as in its
separate sentence, and detect one replaced word, or three missing words, in the text of each sentence.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from u2moe.benchmarks.results.files import publish
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.studies.shared.script import peak_memory, recognition_parser, script
from u2moe.runtime import DecodingOptions, Recognizer, WordResult
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.text.word_errors import matches, words

RATE = 16_000
STREAMED = DecodingOptions(chunk_size=16, num_left_chunks=4)
CONDITIONS = {"full": DecodingOptions(), "chunk 16": STREAMED}
ALIGNED = "full, words given"
EDGES, KINDS = ("start", "end"), ("median", "p90")
HOUR_S = 3600
WORDS_PER_UTTERANCE = 5
PAUSES_S = (0.05, 0.6)
_STEP_S = 0.01
_QUIET = 0.01  # A word lasts from its first to its last 10 ms above this fraction (-40 dB) of its loudest 10 ms.
_NOISE = 1e-4  # Standard deviation of the noise in pauses. Microphones do not record digital silence.

JoinedWords = tuple[npt.NDArray[np.float32], list[WordResult]]  # samples at 16 kHz, and the words that they contain


def join_words(recordings: Sequence[Recording], num_utterances: int, seed: int = 0) -> list[JoinedWords]:
    """Return utterances made of random isolated words, with pauses of quiet noise between the words."""
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
    """Return the start and end, in seconds, of a recording's loud part; see `_QUIET`."""
    step = int(_STEP_S * RATE)
    whole = samples[: len(samples) // step * step].reshape(-1, step)
    loudness = np.sqrt((whole.astype(np.float64) ** 2).mean(axis=1))
    loud = np.flatnonzero(loudness > _QUIET * loudness.max())
    return float(loud[0]) * _STEP_S, float(loud[-1] + 1) * _STEP_S


def compare(
    recognizer: Recognizer, utterances: Iterable[JoinedWords], options: DecodingOptions | None
) -> dict[str, Any]:
    """Return errors in the times of recognised words, or of aligned words if `options` is None."""
    starts, ends, num_words = list[float](), list[float](), 0
    for samples, spoken in utterances:
        text = " ".join(word.word for word in spoken)
        transcript = recognizer.transcribe(samples, options=options) if options else recognizer.align(samples, text)
        found = [word for segment in transcript.segments for word in segment.words]
        num_words += len(spoken)
        spelled = [[words(word.word) for word in side] for side in (spoken, found)]
        for expected, position in matches(*spelled):
            starts.append(found[position].start - spoken[expected].start)
            ends.append(found[position].end - spoken[expected].end)
    times = {"start": statistics(starts), "end": statistics(ends)}
    return {"num_words": num_words, "num_recognised": len(starts), **times}


def align_hour(bundle: Path, recognizer: Recognizer, recordings: Sequence[Recording], seed: int = 0) -> dict[str, Any]:
    """Align an hour of joined sentences with `u2moe align`, and each alone. Return time errors and peak memory."""
    random, time = np.random.default_rng(seed), 0.0
    clips = [read_audio(item.path, RATE) for item in recordings]
    alone = [recognizer.align(clip, item.transcript) for clip, item in zip(clips, recordings, strict=True)]
    parts, texts, starts = list[npt.NDArray[np.float32]](), list[str](), list[float]()
    while time < HOUR_S:
        place = int(random.integers(len(clips)))
        pause = np.zeros(int(random.uniform(*PAUSES_S) * RATE), np.float32)
        starts += [time + len(pause) / RATE + word.start for segment in alone[place].segments for word in segment.words]
        time += (len(pause) + len(clips[place])) / RATE
        parts += [pause, clips[place]]
        texts.append(recordings[place].transcript)
    samples = np.concatenate(parts)
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder, "hour.flac"), Path(folder, "hour.json")
        soundfile.write(file, samples + _NOISE * random.standard_normal(len(samples)), RATE)
        file.with_suffix(".txt").write_text("\n".join(texts), encoding="utf-8")
        peak = peak_memory("align", file, "--model", bundle, "-o", output)
        segments = json.loads(output.read_text(encoding="utf-8"))["segments"]
    found = [word["start"] for segment in segments for word in segment["words"]]
    errors = [at - start for at, start in zip(found, starts, strict=True)]
    return {"num_words": len(starts), "seconds": time, "start": statistics(errors), "peak_bytes": peak}


def find_misfits(recognizer: Recognizer, recordings: Sequence[Recording], seed: int = 0) -> dict[str, int]:
    """Count what `align` finds wrong in unchanged texts, with one word replaced, and with three words left out."""
    random = np.random.default_rng(seed)
    known = sorted({word for item in recordings for word in words(item.transcript)})
    counts: Counter[str] = Counter()
    for item in recordings:
        text, samples = words(item.transcript), read_audio(item.path, RATE)
        if len(text) < WORDS_PER_UTTERANCE:
            continue
        place = int(random.integers(len(text) - 2))
        other = str(random.choice([word for word in known if word not in text]))
        texts = (text, [*text[:place], other, *text[place + 1 :]], text[:place] + text[place + 3 :])
        right, replaced, shorter = (recognizer.align(samples, " ".join(each)) for each in texts)
        is_found = other in [word.word for word in replaced.misfits]
        counts.update(sentences=1, words=len(text), misfits=len(right.misfits), unwritten=len(right.unwritten))
        counts.update(replaced_found=is_found, left_out_found=len(shorter.unwritten) > 0)
    return dict(counts)


def statistics(errors_s: Sequence[float]) -> dict[str, float] | None:
    """Return statistics in milliseconds: the mean error, and mean, median and 90th percentile of absolute errors."""
    if not errors_s:
        return None
    errors = 1000 * np.asarray(errors_s)
    sizes = np.abs(errors)
    figures = {"bias_ms": errors.mean(), "mean_ms": sizes.mean()}
    figures |= {"median_ms": np.median(sizes), "p90_ms": np.percentile(sizes, 90)}
    return {name: round(float(value), 1) for name, value in figures.items()}


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for pages: a row for each set and condition, and single numbers for the text."""
    rows = []
    numbers: dict[str, str] = {}
    for name, conditions in results["sets"].items():
        for condition, found in conditions.items():
            if found["start"]:
                times = {f"{edge}_{kind}": f"{found[edge][f'{kind}_ms']:.0f}" for edge in EDGES for kind in KINDS}
                numbers = numbers or times
                shown = [f"{times[f'{edge}_median']}, {times[f'{edge}_p90']} ms" for edge in EDGES]
                bias = ", ".join(f"{found[edge]['bias_ms']:+.0f}" for edge in EDGES) + " ms"
                rows.append((name, condition, f"{found['num_recognised']} of {found['num_words']}", *shown, bias))
    header = ("speech", "context", "words recognised", "start: median, 90 %", "end: median, 90 %", "bias of start, end")
    if "hour" in results:
        hour, fits = results["hour"], results["misfits"]
        numbers |= {
            "aligned_mean": f"{next(iter(results['sets'].values()))[ALIGNED]['start']['mean_ms']:.0f}",
            "hour_mean": f"{hour['start']['mean_ms']:.0f}",
            "hour_words": f"{hour['num_words']:,}",
            "hour_mb": f"{hour['peak_bytes'] / 1e6:.0f}",
            "misfits": f"{fits['misfits'] / fits['words']:.1%}",
            "unwritten": str(fits["unwritten"]),
            "replaced": f"{fits['replaced_found'] / fits['sentences']:.0%}",
            "left_out": f"{fits['left_out_found'] / fits['sentences']:.0%}",
        }
    return {"table": table(header, rows), **numbers}


@script
def main(argv: Sequence[str] | None = None) -> None:
    parser = recognition_parser("word_times", __doc__)
    parser.add_argument("--utterances", type=int, default=100, help="number of utterances per set (default: 100)")
    about = "list of sentences to align: joined into an hour of audio, and one by one with correct and wrong texts"
    parser.add_argument("--sentences", type=Path, help=about)
    args = parser.parse_args(argv)
    recognizer = Recognizer.from_pretrained(args.bundle)
    conditions = {**CONDITIONS, **({ALIGNED: None} if args.sentences else {})}
    results: dict[str, Any] = {"sets": {}}
    for path in args.lists:
        spoken = join_words(read_recordings(path), args.utterances)
        found = {condition: compare(recognizer, spoken, options) for condition, options in conditions.items()}
        results["sets"][path.stem] = found
    if args.sentences:
        sentences = read_recordings(args.sentences)
        results["hour"] = align_hour(args.bundle, recognizer, sentences)
        results["misfits"] = find_misfits(recognizer, sentences)
    publish(args.results, results, values, bundle=args.bundle)
