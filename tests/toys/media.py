"""Media files to read back, written by PyAV."""

import numpy as np
import pytest

CODECS = {
    "m4a": "aac", "aac": "aac", "mp4": "alac", "webm": "libopus", "mkv": "flac", "wma": "wmav2", "avi": "pcm_u8",
    "mov": "pcm_s16le", "mka": "pcm_s32le", "ac3": "ac3", "flv": "aac", "wv": "wavpack", "ts": "aac",
}  # fmt: skip
"""The codec for each suffix."""
LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
"""The layout for each number of channels."""
_FORMATS = {"m4a": "mp4", "mka": "matroska", "mkv": "matroska", "wma": "asf", "aac": "adts", "ts": "mpegts"}


def write_media(file, tracks, *, with_video=False, rate=16_000, languages=(), gaps=None, **options):
    """Write a file with an audio track for each array, encoded by PyAV according to its suffix. `gaps` maps positions
    to numbers of silent samples that exist only in the time stamps, not in the file."""
    av, suffix = pytest.importorskip("av"), file.suffix[1:]
    with av.open(file, "w", format=_FORMATS.get(suffix, suffix), options=options) as container:
        if with_video:
            video = container.add_stream("mpeg4", rate=5, width=16, height=16, pix_fmt="yuv420p")
        codec = CODECS.get(suffix, "libopencore_amrnb")
        streams = [add_track(container, codec, rate, samples) for samples in tracks]
        for stream, language in zip(streams, languages, strict=False):
            stream.metadata["language"] = language
        if with_video:
            for _ in range(5 * len(tracks[0]) // rate):
                container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
            container.mux(video.encode())
        for stream, samples in zip(streams, tracks, strict=True):
            encode(container, stream, samples, rate, gaps)
    return file


def add_track(container, codec, rate, samples):
    """Add a stream for samples [n] or [n, channels]."""
    stream = container.add_stream(codec, rate=rate, layout=LAYOUTS[samples[:1].size])
    stream.bit_rate = 12_200 if container.format.name == "amr" else 64_000
    return stream


def encode(container, stream, samples, rate, gaps=None):
    """Write samples to a stream of a container, which may have another rate."""
    av, done = pytest.importorskip("av"), 0
    array = np.ascontiguousarray(samples.reshape(1, -1))
    frame = av.AudioFrame.from_ndarray(array, format="flt", layout=stream.layout.name)
    frame.rate, fifo = rate, av.AudioFifo()
    resampler = av.AudioResampler(stream.format, stream.layout, stream.rate)
    for part in (*resampler.resample(frame), *resampler.resample(None)):
        part.pts = None
        fifo.write(part)
    size = stream.codec_context.frame_size or 1024
    while part := fifo.read(size) or fifo.read():
        if gaps is not None:
            part.pts = done + sum(length for place, length in gaps.items() if place <= done)
        done += part.samples
        container.mux(stream.encode(part))
    container.mux(stream.encode())
