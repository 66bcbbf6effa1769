"""The loop of a live source: audio in as it comes, partial and final results out. Knows no threads and no files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy.typing as npt

from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.result import Result
from u2moe.runtime.stream import Stream


class LiveRecognition:
    """Recognises a source while it lasts. `accept` and `finish` yield its new results.

    These are each segment once, and after it a partial result of what follows if its text has changed. An empty text
    takes back a partial result that no segment has replaced. Where decoding fails, the segments before come first.

    Attributes:
        stream: of the source, with endpoint rules.
        shown: text of the last partial result; empty after a segment.
    """

    def __init__(self, recognizer: Recognizer, stream: Stream) -> None:
        self.stream = stream
        self.shown = ""
        self._recognizer = recognizer

    def accept(self, sample_rate: float, samples: npt.ArrayLike) -> Iterator[Result]:
        """Recognise more samples; see `Stream.accept_waveform`."""
        self.stream.accept_waveform(sample_rate, samples)
        return self._decode()

    def finish(self) -> Iterator[Result]:
        """Recognise the end of the source."""
        self.stream.input_finished()
        return self._decode()

    def results(self, num_alternatives: int = 0) -> list[Result]:
        """The new results, where the stream is decoded elsewhere; the partial one with alternatives."""
        found = self.stream.take_segments()
        partial = self.stream.source.result(num_alternatives)
        before = "" if found else self.shown
        self.shown = "" if partial.is_final else partial.text
        return found if self.shown == before else [*found, replace(partial, is_final=False)]

    def _decode(self) -> Iterator[Result]:
        try:
            self._recognizer.decode_streams([self.stream])
        except Exception:
            yield from self.stream.take_segments()
            raise
        yield from self.results()
