"""A video of several hours with two audio tracks is recognised segment by segment in constant memory."""

import numpy as np
import pytest
from damage import resident_mb

from u2moe.runtime import Recognizer
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.text.word_errors import words

av = pytest.importorskip("av")
pytestmark = [pytest.mark.slow, pytest.mark.endurance]

CODECS = {"mp4": "aac", "mkv": "libopus"}
RATE = 48_000
FRAMES_PER_S = 5
HOURS = 3


def write_minute(file, codec):
    """Write a minute of noise video with two tracks, silence and the clips; return its seconds and spoken words."""
    recordings = read_recordings(DEMO_FOLDER / "clips" / "transcripts.txt")
    pause = np.zeros(2 * RATE, np.float32)
    spoken = np.tile(np.concatenate([part for item in recordings for part in (read_audio(item.path, RATE), pause)]), 4)
    random = np.random.default_rng(0)
    with av.open(file, "w") as container:
        video = container.add_stream("mpeg4", rate=FRAMES_PER_S, width=64, height=48, pix_fmt="yuv420p")
        tracks = [container.add_stream(codec, rate=RATE, layout="mono") for _ in range(2)]
        for _ in range(int(len(spoken) / RATE * FRAMES_PER_S)):
            image = random.integers(0, 255, (48, 64, 3), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for track, samples in zip(tracks, (0 * spoken, spoken), strict=True):
            resampler = av.AudioResampler(track.format.name, "mono", RATE, track.codec_context.frame_size)
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.rate = RATE
            for part in resampler.resample(frame):
                container.mux(track.encode(part))
            container.mux(track.encode())
        container.mux(video.encode())
    return len(spoken) / RATE, 4 * sum(len(words(item.transcript)) for item in recordings)


def write_video(file, codec):
    """Write the packets of a minute repeatedly; return the number of spoken words."""
    minute = file.with_name(f"minute{file.suffix}")
    minute_s, num_words = write_minute(minute, codec)
    count = round(3600 * HOURS / minute_s)
    with av.open(file, "w") as container:
        tracks = None
        for number in range(count):
            with av.open(minute) as source:
                tracks = tracks or [container.add_stream_from_template(stream) for stream in source.streams]
                for packet in source.demux():
                    if packet.pts is not None and packet.dts is not None and packet.time_base:
                        shift = round(number * minute_s / packet.time_base)
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = tracks[packet.stream_index]
                        container.mux(packet)
    return count * num_words


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("suffix", CODECS)
def test_the_second_track_is_heard_in_flat_memory(suffix, tmp_path):
    num_words = write_video(tmp_path / f"video.{suffix}", CODECS[suffix])
    memory = []
    options = {"track": 1, "on_progress": lambda seconds: memory.append((seconds, resident_mb()))}
    segments = Recognizer.from_pretrained().segments(tmp_path / f"video.{suffix}", **options)
    num_recognised = sum(len(words(segment.text)) for segment in segments)
    assert num_recognised == pytest.approx(num_words, rel=0.1)  # the other track is silent
    early_mb = next(mb for seconds, mb in memory if seconds > 360 * HOURS)
    assert memory[-1][1] < 1.1 * early_mb
