"""Recognise WAV files as streams in Python, and print a JSON line for each, as examples/browser/transcribe.mjs does.

python -m u2moe.benchmarks.studies.shared.python_program BUNDLE FILE.wav...
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from u2moe.runtime import DecodingOptions, EndpointConfig, Recognizer, Result

CHUNK_SIZE, LEFT_CHUNKS = 16, 4
STREAM = DecodingOptions(chunk_size=CHUNK_SIZE, num_left_chunks=LEFT_CHUNKS, endpoint=EndpointConfig())


def recognized(recognizer: Recognizer, samples: npt.NDArray[np.int16]) -> list[Result]:
    """Segments of a recording that arrives second by second."""
    rate = recognizer.bundle.manifest.features.sample_rate
    stream, segments = recognizer.create_stream(), list[Result]()
    for start in range(0, len(samples), rate):
        stream.accept_waveform(rate, samples[start : start + rate])
        recognizer.decode_streams([stream])
        segments += stream.take_segments()
    stream.input_finished()
    recognizer.decode_streams([stream])
    return [*segments, *stream.take_segments()]


def data(result: Result) -> dict[str, Any]:
    """A segment as the programs in other languages print it."""
    return {
        "text": result.text,
        "tokens": result.tokens,
        "times": result.times,
        "words": [{"word": word.word, "start": word.start, "end": word.end} for word in result.words],
        "nbest": [{"tokens": item.tokens, "score": item.score} for item in result.nbest],
    }


def main(bundle: str, *files: str) -> int:
    """Load, recognise, print."""
    begin = time.perf_counter()
    recognizer = Recognizer.from_pretrained(Path(bundle), options=STREAM)
    load_ms = 1000 * (time.perf_counter() - begin)
    for file in files:
        samples, _ = soundfile.read(file, dtype="int16")
        start = time.perf_counter()
        found = recognized(recognizer, samples)
        took = 1000 * (time.perf_counter() - start)
        print(json.dumps({"file": file, "segments": [*map(data, found)], "ms": took, "load_ms": load_ms}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
