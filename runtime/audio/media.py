"""Read an audio track of a media file (m4a, mp4, webm, mkv, wma, amr, video and more) with PyAV (extra [media]).

`MediaFile` has the members of `soundfile.SoundFile` that `reading` uses. Its samples equal those from ffmpeg.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from u2moe.runtime.audio.arrays import Samples
from u2moe.runtime.errors import AudioError
from u2moe.runtime.installation import install_command

if TYPE_CHECKING:
    import av

EXTRA = install_command("media")

_CONTAINERS = (
    "3gp,aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,gsm,matroska,mov,mp3,mp4,mpc,mpc8,mpeg,"
    "mpegts,mxf,nut,ogg,oma,rm,tak,tta,voc,w64,wav,webm,wtv,wv"
)
"""Allowed formats. Other formats of ffmpeg refer to further files and addresses (hls, concat) or accept anything."""
_STATES_LENGTH = re.compile("mov|matroska|asf")  # Their headers state the length. For others, ffmpeg estimates it.
_TAGGED_LENGTH = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")
_MOST_CHANNELS = 64  # maximum number of channels that ffmpeg converts
_CUT_OFF_S = 0.5
_LONGEST_PACKET_S = 2.0  # longest duration accepted from a damaged packet, which may state any value
_LEAST_GAP_S = 0.25  # Shortest gap between time stamps that silence fills. Shorter gaps are artefacts of encoders.
_LONGEST_GAP_S = 3600.0
"""Longest gap that silence fills if the file does not state its length. A damaged time stamp may have any value."""


class MediaFile:
    """An audio track of an open, seekable media file. Silence fills gaps and a late start, so times are the file's.

    `track` is the index of the audio track; None: the track marked as default, or else the first.

    Attributes:
        samplerate: sample rate in Hz.
        channels: number of channels.
        frames: length stated in the header, in samples per channel; `sys.maxsize` if not stated.

    Raise ModuleNotFoundError if PyAV is not installed, and AudioError if the file is not a media file, is damaged, or
    has no such track.
    """

    def __init__(self, stream: BinaryIO, track: int | None = None) -> None:
        import av  # noqa: PLC0415 - an extra

        self._av = av
        self._errors = (av.FFmpegError, ValueError, OSError)
        # Ignore titles that are not UTF-8. PyAV 19 accepts them and has no such option.
        metadata: Any = {"metadata_errors": "ignore"} if int(av.__version__.partition(".")[0]) < 19 else {}
        allowed = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
        try:
            self._container = av.open(stream, "r", options=allowed, **metadata)
        except self._errors as error:
            raise AudioError(_reason(error)) from error
        self._form: tuple[str, str, int] | None = None
        self.num_damaged, self.lost_s = 0, 0.0
        try:
            self._stream = self._track(track)
            self._begin_s = 0.0 if self._container.start_time is None else self._container.start_time / 1e6
            self._buffers = self._decode()
            self._rest = next(self._buffers, None)
        except BaseException as error:
            self.close()
            if isinstance(error, self._errors):
                raise AudioError(f"is damaged: {_reason(error)}") from error
            raise
        if self._rest is None:
            self.close()
            raise AudioError("its audio cannot be decoded" if self.num_damaged else "its audio track is empty")
        self.channels: int = self._rest.shape[1]
        stated_s = self._stated_s()
        self.frames = sys.maxsize if stated_s is None else round(stated_s * self.samplerate)

    def close(self) -> None:
        """Close the decoder; the stream stays open."""
        self._container.close()

    def read(self, size: int, **_: object) -> Samples:
        """Read up to `size` frames [frames, channels], float32; none at the end. Raises AudioError for damage."""
        parts = []
        while size > 0 and self._rest is not None:
            parts.append(self._rest[:size])
            size -= len(parts[-1])
            left = self._rest[len(parts[-1]) :]
            self._rest = left if len(left) else next(self._buffers, None)
        return np.concatenate(parts) if parts else np.zeros((0, self.channels), np.float32)

    def damage(self, num_read: int) -> str | None:
        """Describe missing or damaged audio of a track that ended after `num_read` frames; None if there is none."""
        if self.frames < sys.maxsize and (self.frames - num_read) / self.samplerate > _CUT_OFF_S:
            stated_s, found_s = self.frames / self.samplerate, num_read / self.samplerate
            return f"contains {found_s:.1f} of the {stated_s:.1f} s stated in its header: it is truncated"
        if self.num_damaged:
            return f"{self.num_damaged} audio packets ({self.lost_s:.1f} s) are damaged and were replaced by silence"
        return None

    def _track(self, track: int | None) -> Any:
        tracks = self._container.streams.audio
        if not tracks:
            raise AudioError("contains no audio track")
        if track is not None and track not in range(len(tracks)):
            known = ", ".join(f"{index} ({_describe(item)})" for index, item in enumerate(tracks))
            raise AudioError(f"audio track {track} does not exist: the file has {known}")
        found = tracks[track] if track is not None else self._container.streams.best("audio") or tracks[0]
        if found.codec_context is None:
            raise AudioError("its audio track has an unknown format")
        found.codec_context.thread_count = 1
        if discard := getattr(self._av.stream, "Discard", None):  # missing in older versions
            for other in self._container.streams:
                if other.index != found.index:
                    other.discard = discard.all
        return found

    def _decode(self) -> Iterator[Samples]:
        """Yield buffers [frames, channels]. Silence replaces undecodable packets, so times stay correct."""
        packets = self._container.demux(self._stream)
        self.samplerate = num_channels = num_frames = 0
        while True:
            try:
                packet = next(packets, None)
            except (IndexError, BlockingIOError):  # for a stream that begins late, and after junk: try the next packet
                packets = self._container.demux(self._stream)
                continue
            except self._errors as error:
                raise AudioError(f"is damaged: {_reason(error)}") from error
            if packet is None:
                return
            try:
                frames = packet.decode()
            except self._errors:
                self.num_damaged += 1
                lost_s = float(packet.duration * packet.time_base) if packet.duration and packet.time_base else 0.0
                if not 0 <= lost_s <= _LONGEST_PACKET_S:
                    continue
                self.lost_s += lost_s
                if num_channels:
                    num_frames += round(lost_s * self.samplerate)
                    yield np.zeros((round(lost_s * self.samplerate), num_channels), np.float32)
                continue
            for frame in frames:
                samples = self._packed(frame)
                self.samplerate = self.samplerate or frame.sample_rate
                num_channels = num_channels or samples.shape[1]
                if (frame.sample_rate, samples.shape[1]) != (self.samplerate, num_channels):
                    before = f"{num_channels} channels at {self.samplerate} Hz"
                    raise AudioError(f"changes from {before} to {samples.shape[1]} at {frame.sample_rate} Hz")
                for silence in self._gap(frame, num_frames, num_channels):
                    num_frames += len(silence)
                    yield silence
                num_frames += len(samples)
                if len(samples):
                    yield samples

    def _packed(self, frame: av.AudioFrame) -> Samples:
        """Return samples [frames, channels]. ffmpeg interleaves: PyAV reads invalid memory for eight planes."""
        num_channels = frame.layout.nb_channels
        if num_channels > _MOST_CHANNELS:
            raise AudioError(f"has {num_channels} channels, expected at most {_MOST_CHANNELS}")
        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if form != self._form:
            self._form, self._packer = form, self._av.AudioResampler(format="flt")
        parts = [part.to_ndarray().reshape(-1, num_channels) for part in self._packer.resample(frame)]
        return np.concatenate(parts) if parts else np.zeros((0, num_channels), np.float32)

    def _gap(self, frame: av.AudioFrame, num_before: int, num_channels: int) -> Iterator[Samples]:
        """Yield silence [frames, channels] that fills the gap before a frame, if there clearly is one."""
        if frame.pts is None or frame.time_base is None:
            return
        begin_s = num_before / self.samplerate
        gap_s = float(frame.pts * frame.time_base) - self._begin_s - begin_s
        length = self._container.duration
        longest_s = _LONGEST_GAP_S if length is None else length / 1e6 - begin_s
        if not _LEAST_GAP_S < gap_s <= longest_s:
            return
        left = round(gap_s * self.samplerate)
        while left > 0:  # one second at a time, because the gap may be long
            yield np.zeros((min(left, self.samplerate), num_channels), np.float32)
            left -= self.samplerate

    def _stated_s(self) -> float | None:
        """Return the length of the track in seconds as stated in the header, or None."""
        codec = self._stream.codec_context.name
        if self._container.format.name == "caf" and codec.startswith("pcm") and self._stream.frames:
            return float(self._stream.frames / self._stream.rate)
        if not _STATES_LENGTH.search(self._container.format.name):
            return None
        if self._container.format.name.startswith("mov") and self._stream.duration is not None:
            late_s = float((self._stream.start_time or 0) * self._stream.time_base) - self._begin_s
            return float(self._stream.duration * self._stream.time_base) + (late_s if late_s > _LEAST_GAP_S else 0.0)
        if tagged := _TAGGED_LENGTH.match(self._stream.metadata.get("DURATION", "")):
            hours, minutes, seconds = tagged.groups()
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        if len(self._container.streams) == 1 and self._container.duration is not None:
            return float(self._container.duration / 1e6)
        return None


def _describe(track: Any) -> str:
    language = track.metadata.get("language", "").encode("ascii", "ignore").decode()
    codec = track.codec_context.name if track.codec_context else "unknown"
    return ", ".join(part for part in (language if language != "und" else "", codec) if part)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
