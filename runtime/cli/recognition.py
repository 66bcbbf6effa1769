"""Recognises one recording for the command line, as a whole or as if it were live, and survives damage and Ctrl-C."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from u2moe.runtime.audio.reading import read_blocks
from u2moe.runtime.cli.inputs import Input
from u2moe.runtime.cli.outputs import Output
from u2moe.runtime.decoding.vad import VoiceActivityDetector
from u2moe.runtime.errors import AudioError, U2moeError
from u2moe.runtime.live import LiveRecognition
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.recording import transcript_of
from u2moe.runtime.result import Result, Transcript

_STREAM_BLOCK_S = 0.1


class Recognition:
    """Recognises recordings, one at a time.

    Args:
        recognizer: recognises them.
        vad: detects speech; None: all is recognised.
        is_stream: recognise chunk by chunk, with partial results.
        output: gets partial results and segments.
        on_progress: called with the seconds that are done, unless a partial result is shown.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        vad: VoiceActivityDetector | None,
        *,
        is_stream: bool,
        output: Output,
        on_progress: Callable[[float], None],
    ) -> None:
        self._recognizer = recognizer
        self._vad = vad
        self._is_stream = is_stream
        self._output = output
        self._on_progress = on_progress
        self._segments: list[Result] = []
        self._seconds = 0.0

    def transcript(self, item: Input) -> tuple[Transcript, bool]:
        """A transcript, and whether Ctrl-C interrupted it: it then has everything recognised before.

        Raises:
            AudioError: none of the audio can be read.
        """
        self._segments, self._seconds = [], 0.0
        error, is_interrupted = None, False
        try:
            (self._live if self._is_stream else self._whole)(item)
        except KeyboardInterrupt:
            error, is_interrupted = AudioError(f"{item.name}: interrupted; what was recognised is kept"), True
        except AudioError as damage:
            if self._seconds == 0:
                raise
            error = damage
        if self._seconds == 0 and not is_interrupted:
            raise AudioError(f"{item.name}: holds no samples")
        return transcript_of(self._segments, self._seconds, error), is_interrupted

    def _whole(self, item: Input) -> None:
        def progressed(seconds: float) -> None:
            self._seconds = seconds
            self._on_progress(seconds)

        for segment in self._recognizer.segments(
            item.audio, vad=self._vad, on_progress=progressed, channel=item.channel, track=item.track
        ):
            self._keep(item, segment)

    def _live(self, item: Input) -> None:
        options = replace(self._recognizer.options, endpoint=self._recognizer.default_endpoint)
        live = LiveRecognition(self._recognizer, self._recognizer.create_stream(options))
        rate = self._recognizer.bundle.manifest.features.sample_rate
        try:
            for block in read_blocks(item.audio, rate, _STREAM_BLOCK_S, channel=item.channel, track=item.track):
                self._show(item, live.accept(rate, block))
                self._seconds = live.stream.duration
                if not live.shown:
                    self._on_progress(self._seconds)
        except (AudioError, KeyboardInterrupt):
            with contextlib.suppress(U2moeError):  # keep what was recognised so far
                self._show(item, live.finish())
            raise
        self._show(item, live.finish())

    def _show(self, item: Input, results: Iterator[Result]) -> None:
        for result in results:
            if result.is_final:
                self._keep(item, result)
            else:
                self._output.partial(item, result)

    def _keep(self, item: Input, segment: Result) -> None:
        self._segments.append(segment)
        self._output.segment(item, segment)
