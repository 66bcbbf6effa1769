"""Does a video of hours with two audio tracks stay in flat memory, read as media and recognised segment by segment?

    python -m u2moe.benchmarks.endurance.long_video [--hours 3] [--output long_video.json]

Needs the extra [media]. The video repeats the clips of the demo model, with pauses, on its second track.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from u2moe.benchmarks.endurance.memory import resident_mb
from u2moe.benchmarks.results.files import results_file
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import publish
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.runtime import Recognizer
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.recognizer import DEMO_FOLDER
from u2moe.runtime.text.word_errors import read_manifest, words

CONTAINERS = {"mp4": "aac", "mkv": "libopus"}
"""The audio codec of the video in each container."""
_RATE = 48_000
_PAUSE_S = 2.0
_UNIT_S = 60.0
_FRAMES_PER_S = 5
_NUM_MEASURED = 10


def write_video(file: Path, hours: float, codec: str) -> int:
    """Write a video of noise with two audio tracks, silence and speech. Returns the number of words spoken.

    A minute is encoded, and its packets are repeated.
    """
    import av  # noqa: PLC0415 - an extra

    unit = file.with_name(f"unit{file.suffix}")
    unit_s, num_words = _write_unit(unit, codec)
    num_repeats = max(round(3600 * hours / unit_s), 1)
    with av.open(file, "w") as container:
        tracks = None
        for number in range(num_repeats):
            with av.open(unit) as source:
                tracks = tracks or [container.add_stream_from_template(stream) for stream in source.streams]
                for packet in source.demux():
                    if packet.pts is not None and packet.dts is not None and packet.time_base:
                        shift = round(number * unit_s / packet.time_base)
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = tracks[packet.stream_index]
                        container.mux(packet)
    return num_repeats * num_words


def _write_unit(file: Path, codec: str) -> tuple[float, int]:
    """Write about a minute. Returns its seconds, and the number of words spoken."""
    import av  # noqa: PLC0415

    recordings = read_manifest(DEMO_FOLDER / "clips" / "transcripts.txt")
    pause = np.zeros(int(_PAUSE_S * _RATE), np.float32)
    spoken = np.concatenate([part for item in recordings for part in (read_audio(item.path, _RATE), pause)])
    num_repeats = max(round(_UNIT_S * _RATE / len(spoken)), 1)
    spoken = np.tile(spoken, num_repeats)
    random = np.random.default_rng(0)
    with av.open(file, "w") as container:
        video = container.add_stream("mpeg4", rate=_FRAMES_PER_S, width=64, height=48, pix_fmt="yuv420p")
        streams = [container.add_stream(codec, rate=_RATE, layout="mono") for _ in range(2)]
        tracks = [stream for stream in streams if isinstance(stream, av.AudioStream)]
        for _ in range(int(len(spoken) / _RATE * _FRAMES_PER_S)):
            image = random.integers(0, 255, (48, 64, 3), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for track, samples in zip(tracks, (0 * spoken, spoken), strict=True):
            resampler = av.AudioResampler(track.format.name, "mono", _RATE, track.codec_context.frame_size)
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.rate = _RATE
            for part in resampler.resample(frame):
                container.mux(track.encode(part))
            container.mux(track.encode())
        container.mux(video.encode())
    return len(spoken) / _RATE, num_repeats * sum(len(words(item.transcript)) for item in recordings)


def measure(recognizer: Recognizer, suffix: str, hours: float) -> dict[str, Any]:
    """Recognise the second track of a video.

    Returns:
        `file_mb`, `audio_s`, `wall_s`; `num_words` spoken and `num_recognised`; `memory_mb`: resident megabytes after
        each tenth.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"video.{suffix}"
        num_words = write_video(file, hours, CONTAINERS[suffix])
        report(f"{suffix}: {file.stat().st_size / 1e6:.0f} MB")
        memory_mb: list[float] = []
        audio_s, num_recognised = 0.0, 0

        def progressed(seconds: float) -> None:
            nonlocal audio_s
            audio_s = seconds
            if seconds >= (len(memory_mb) + 1) / _NUM_MEASURED * 3600 * hours * 0.99:
                memory_mb.append(round(resident_mb(), 1))

        begin = time.perf_counter()
        for segment in recognizer.segments(file, track=1, on_progress=progressed):
            num_recognised += len(words(segment.text))
        return {
            "file_mb": round(file.stat().st_size / 1e6, 1),
            "audio_s": round(audio_s, 1),
            "wall_s": round(time.perf_counter() - begin, 1),
            "num_words": num_words,
            "num_recognised": num_recognised,
            "memory_mb": memory_mb,
        }


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each container, and the largest growth in megabytes after the first tenth."""
    header = ("container", "size", "audio", "words spoken", "recognised", "memory after a tenth", "at the end")
    rows = []
    for suffix, found in results["found"].items():
        first, *_, last = (f"{megabytes:.0f} MB" for megabytes in found["memory_mb"])
        size, hours = f"{found['file_mb']:.0f} MB", f"{found['audio_s'] / 3600:.2f} h"
        counts = (f"{found[name]:,}" for name in ("num_words", "num_recognised"))
        rows.append((f"{suffix}, {CONTAINERS[suffix]}", size, hours, *counts, first, last))
    growth = max(found["memory_mb"][-1] - found["memory_mb"][0] for found in results["found"].values())
    return {"table": table(header, rows), "growth": f"{max(growth, 0):.0f}"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = script_parser("endurance.long_video", __doc__)
    parser.add_argument("--hours", type=_positive, default=3.0, help="default: 3")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    recognizer = Recognizer.from_pretrained()
    found = {suffix: measure(recognizer, suffix, args.hours) for suffix in CONTAINERS}
    content = {"hours": args.hours, "found": found}
    publish(recognizer.bundle.path, content, values, args.output or results_file("long_video"))
    return 0


def _positive(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return float(text)


if __name__ == "__main__":
    run_script(main)
