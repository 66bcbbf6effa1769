"""Media files to read back, written by PyAV."""

import numpy as np
import pytest

CODECS = {
    "m4a": "aac", "aac": "aac", "mp4": "alac", "webm": "libopus", "mkv": "flac", "wma": "wmav2", "avi": "pcm_u8",
    "mov": "pcm_s16le", "mka": "pcm_s32le", "ac3": "ac3", "flv": "aac", "wv": "wavpack",
}  # fmt: skip
"""The codec for each suffix."""
LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
"""The layout for each number of channels."""


def write_media(file, tracks, *, with_video=False, rate=16_000, languages=(), gaps=None, **options):
    """Write a file with an audio track for each array, encoded by PyAV according to its suffix. `gaps` maps positions
    to numbers of silent samples that exist only in the time stamps, not in the file."""
    av = pytest.importorskip("av")
    container_format = {"m4a": "mp4", "mka": "matroska", "mkv": "matroska", "wma": "asf", "aac": "adts"}
    suffix = file.suffix[1:]
    with av.open(file, "w", format=container_format.get(suffix, suffix), options=options) as container:
        if with_video:
            video = container.add_stream("mpeg4", rate=5, width=16, height=16, pix_fmt="yuv420p")
        streams = [container.add_stream(CODECS.get(suffix, "libopencore_amrnb"), rate=rate) for _ in tracks]
        for stream, language in zip(streams, languages, strict=False):
            stream.metadata["language"] = language
        for stream, samples in zip(streams, tracks, strict=True):
            stream.bit_rate = 12_200 if suffix == "amr" else 64_000
            stream.layout = LAYOUTS[samples.size // len(samples)]
        if with_video:
            for _ in range(5 * len(tracks[0]) // rate):
                container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
            container.mux(video.encode())
        for stream, samples in zip(streams, tracks, strict=True):
            array = np.ascontiguousarray(samples.reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(array, format="flt", layout=stream.layout.name)
            frame.rate = rate
            resampler = av.AudioResampler(stream.format, stream.layout, rate)
            fifo = av.AudioFifo()
            for part in resampler.resample(frame):
                fifo.write(part)
            size = stream.codec_context.frame_size or 1024
            done = 0
            while part := fifo.read(size) or fifo.read():
                if gaps is not None:
                    part.pts = done + sum(length for place, length in gaps.items() if place <= done)
                done += part.samples
                container.mux(stream.encode(part))
            container.mux(stream.encode())
    return file
