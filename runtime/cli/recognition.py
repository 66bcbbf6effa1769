"""Recognises one recording for the command line, as a whole or as if it were live, and survives damage and Ctrl-C."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from u2moe.runtime.cli.inputs import Input
from u2moe.runtime.decoding.vad import VoiceActivityDetector
from u2moe.runtime.errors import AudioError, U2moeError
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.recording import Blocks, recognize, transcript_of
from u2moe.runtime.result import Result, Transcript
from u2moe.runtime.stream import Stream

_BLOCK_S = 10.0
_STREAM_BLOCK_S = 0.1
_INTERRUPTED = "interrupted; what was recognised is kept"


class _Progressed(Protocol):
    """Takes notice of the seconds that are done, and shows them, unless something else is shown there."""

    def __call__(self, done: float, *, is_shown: bool = True) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Recognition:
    """Recognises recordings, one at a time.

    Attributes:
        recognizer: recognises them.
        vad: detects speech; None: all is recognised.
        is_stream: recognise chunk by chunk, with partial results.
    """

    recognizer: Recognizer
    vad: VoiceActivityDetector | None
    is_stream: bool

    def transcript(
        self,
        item: Input,
        on_progress: Callable[[float], None],
        *,
        found: Callable[[Result], None],
        partial: Callable[[Result], None],
    ) -> tuple[Transcript, bool]:
        """A transcript, and whether Ctrl-C interrupted it: it then has everything recognised before.

        Args:
            item: the recording.
            on_progress: called with the seconds that are done.
            found: called with each segment as it is found.
            partial: called with each new partial result of a stream.

        Raises:
            AudioError: none of the audio can be read.
        """
        segments: list[Result] = []
        seconds, error = 0.0, None

        def progressed(done: float, *, is_shown: bool = True) -> None:
            nonlocal seconds
            seconds = done
            if is_shown:
                on_progress(done)

        def keep(segment: Result) -> None:
            segments.append(segment)
            found(segment)

        try:
            if self.is_stream:
                self._stream(item, progressed, keep, partial)
            else:
                self._whole(item, progressed, keep)
        except KeyboardInterrupt:
            return transcript_of(segments, seconds, AudioError(f"{item.name}: {_INTERRUPTED}")), True
        except AudioError as damage:
            if seconds == 0:
                raise
            error = damage
        return transcript_of(segments, seconds, error), False

    @property
    def _rate(self) -> int:
        return self.recognizer.bundle.manifest.features.sample_rate

    def _whole(self, item: Input, on_progress: Callable[[float], None], found: Callable[[Result], None]) -> None:
        stream = self.recognizer.create_recording_stream()
        blocks = Blocks(item.blocks(self._rate, _BLOCK_S), self._rate, on_progress)
        for segment in recognize(self.recognizer.decode_streams, stream, blocks, self.vad):
            found(segment)
        if blocks.error is not None:
            raise blocks.error

    def _stream(
        self,
        item: Input,
        on_progress: _Progressed,
        found: Callable[[Result], None],
        partial: Callable[[Result], None],
    ) -> None:
        """Recognise a recording as if it were live. Where a partial result stands, progress is not shown."""
        stream = self.recognizer.create_stream()
        shown = ""
        try:
            for block in item.blocks(self._rate, _STREAM_BLOCK_S):
                stream.accept_waveform(self._rate, block)
                self._decode(stream, found)
                result = stream.get_result()
                on_progress(stream.duration, is_shown=not result.text)
                if result.text != shown:
                    shown = result.text
                    partial(result)
        except (AudioError, KeyboardInterrupt):
            with contextlib.suppress(U2moeError):  # keep what was recognised so far
                stream.input_finished()
                self._decode(stream, found)
            raise
        stream.input_finished()
        self._decode(stream, found)

    def _decode(self, stream: Stream, found: Callable[[Result], None]) -> None:
        self.recognizer.decode_streams([stream])
        for segment in stream.take_segments():
            found(segment)
