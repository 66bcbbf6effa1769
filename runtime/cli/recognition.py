"""Recognises one recording for the command line, as a whole or as if it were live, and survives damage and Ctrl-C."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

from u2moe.runtime.cli.inputs import Input
from u2moe.runtime.cli.outputs import Output
from u2moe.runtime.decoding.vad import VoiceActivityDetector
from u2moe.runtime.errors import AudioError, U2moeError
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.recording import Blocks, recognize, transcript_of
from u2moe.runtime.result import Result, Transcript
from u2moe.runtime.stream import Stream

_BLOCK_S = 10.0
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
        self._sample_rate = recognizer.bundle.manifest.features.sample_rate
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

        stream = self._recognizer.create_recording_stream()
        blocks = Blocks(item.blocks(self._sample_rate, _BLOCK_S), self._sample_rate, progressed)
        for segment in recognize(self._recognizer.decode_streams, stream, blocks, self._vad):
            self._keep(item, segment)
        if blocks.error is not None:
            raise blocks.error

    def _live(self, item: Input) -> None:
        options = replace(self._recognizer.options, endpoint=self._recognizer.default_endpoint)
        stream = self._recognizer.create_stream(options)
        shown = ""
        try:
            for block in item.blocks(self._sample_rate, _STREAM_BLOCK_S):
                stream.accept_waveform(self._sample_rate, block)
                self._decode(item, stream)
                result, self._seconds = stream.get_result(), stream.duration
                if not result.text:
                    self._on_progress(self._seconds)
                if result.text != shown:
                    shown = result.text
                    self._output.partial(item, result)
        except (AudioError, KeyboardInterrupt):
            with contextlib.suppress(U2moeError):  # keep what was recognised so far
                stream.input_finished()
                self._decode(item, stream)
            raise
        stream.input_finished()
        self._decode(item, stream)

    def _decode(self, item: Input, stream: Stream) -> None:
        self._recognizer.decode_streams([stream])
        for segment in stream.take_segments():
            self._keep(item, segment)

    def _keep(self, item: Input, segment: Result) -> None:
        self._segments.append(segment)
        self._output.segment(item, segment)
