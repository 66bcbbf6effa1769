"""Does the recogniser run for hours? Audio at full speed, many streams at once, random portions; memory and texts.

    python -m u2moe.benchmarks.endurance.soak BUNDLE TEST.tsv... [--hours 1] [--streams 64] [--output soak.json]

One stream is fed hours of recordings (`long_stream`). Many streams get a few each, together, alone, and in random
portions (`many_streams`). A file of the same length is recognised as a whole (`long_file`). Every encoder frame must be
in exactly one segment, and each segment must equal what the graphs alone recognise in its samples (`cuts`). Exits with
1 on a failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from u2moe.benchmarks.endurance.long_file import LongFile, run_long_file
from u2moe.benchmarks.endurance.long_stream import LongStream, run_long_stream
from u2moe.benchmarks.endurance.many_streams import ManyStreams, run_many_streams
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import kernels_of, publish
from u2moe.benchmarks.script import run_script, script_parser
from u2moe.runtime import DecodingOptions, EndpointConfig, Recognizer
from u2moe.runtime.text.word_errors import Recording, read_manifest

STREAMED = DecodingOptions(chunk_size=16, num_left_chunks=4, endpoint=EndpointConfig())
_MOST_WORSE = 0.02
"""Largest share of words by which the long file may differ in number, or have more errors, than when cut by hand."""


@dataclass(frozen=True, kw_only=True)
class SoakReport:
    """The tests and their results."""

    stream: LongStream
    streams: ManyStreams
    file: LongFile

    @property
    def failures(self) -> list[str]:
        """Descriptions of what went wrong."""
        file, streams = self.file, self.streams
        cuts = (self.stream.cuts, file.cuts)
        more = abs(file.num_recognised - file.num_recognised_by_hand) / max(file.num_recognised_by_hand, 1)
        worse = (file.num_errors - file.num_errors_by_hand) / max(file.num_words, 1)
        found = {
            "memory of the long stream grew": self.stream.memory.grew,
            "memory of the long file grew": file.memory.grew,
            "segments out of order": self.stream.num_disordered > 0,
            "streams together gave another text": streams.num_different > 0,
            "random portions gave another text": streams.num_split_different > 0,
            "frames were lost or repeated at cuts": any(cut.num_lost or cut.num_doubled for cut in cuts),
            "utterances of the long file have words that are not in their samples": bool(file.cuts.num_different),
            "the long file is recognised worse than cut by hand": max(more, worse) > _MOST_WORSE,
        }
        return [name for name, is_so in found.items() if is_so]


def soak(bundle: Path, recordings: Sequence[Recording], *, hours: float = 1.0, num_streams: int = 64) -> SoakReport:
    """Try everything on recordings, drawn at random again and again."""
    streaming, whole = Recognizer.from_pretrained(bundle, options=STREAMED), Recognizer.from_pretrained(bundle)
    random = np.random.default_rng(0)
    return SoakReport(
        stream=run_long_stream(streaming, recordings, hours, random),
        streams=run_many_streams(streaming, recordings, num_streams, random),
        file=run_long_file(whole, recordings, hours, random),
    )


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each run, and their main numbers."""
    stream, streams, file = (results[name] for name in ("stream", "streams", "file"))

    def memory(found: Mapping[str, float]) -> str:
        return f"{found['start_mb']:.0f} MB after a tenth, {found['end_mb']:.0f} MB at the end"

    def cut(cuts: Mapping[str, int]) -> str:
        return f"{cuts['num_utterances']} segments, frames lost {cuts['num_lost']}, doubled {cuts['num_doubled']}"

    def duration(part: Mapping[str, float]) -> str:
        return f"{part['audio_s'] / 3600:.2f} h of audio in {part['wall_s']:.0f} s"

    num = streams["num_streams"]
    runs = {
        "one stream, chunk 16, left 4": [
            duration(stream),
            f"{stream['num_segments']} results, {stream['num_disordered']} out of order",
            cut(stream["cuts"]),
            memory(stream["memory"]),
        ],
        f"{num} streams at once": [
            f"{streams['audio_s'] / 60:.0f} min in {streams['together_s']:.1f} s",
            f"{streams['alone_s']:.1f} s one by one",
            f"other texts or times than alone: {streams['num_different']} of {num}",
            f"alone in random portions: {streams['num_split_different']} of {num}",
        ],
        "one file, full context": [
            duration(file),
            f"{file['num_recordings']} recordings with {file['num_words']} words",
            "{num_recognised} words, {num_recognised_by_hand} cut by hand, {num_recognised_alone} alone".format(**file),
            f"{file['num_errors']} errors, {file['num_errors_by_hand']} cut by hand, {file['num_errors_alone']} alone",
            f"{cut(file['cuts'])}, other words than in their samples: {file['cuts']['num_different']}",
            memory(file["memory"]),
        ],
    }
    return {
        "table": table(("run", "what was found"), ((run, "; ".join(found)) for run, found in runs.items()), left=2),
        "kernels": kernels_of(results),
        "hours": f"{(stream['audio_s'] + file['audio_s']) / 3600:.1f}",
        "streams": str(num),
        "failures": str(len(results["failures"])),
        "start_mb": f"{stream['memory']['start_mb']:.0f}",
        "end_mb": f"{stream['memory']['end_mb']:.0f}",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = script_parser("endurance.soak", __doc__)
    parser.add_argument("bundle", type=Path, help="folder of a bundle")
    parser.add_argument("manifests", type=Path, nargs="+", help="lists of recordings: path<TAB>transcript")
    parser.add_argument("--hours", type=float, default=1.0, help="hours of audio in the long runs (default: 1)")
    parser.add_argument("--streams", type=int, default=64, help="streams decoded at once (default: 64)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    recordings = [recording for manifest in args.manifests for recording in read_manifest(manifest)]
    report = soak(args.bundle, recordings, hours=args.hours, num_streams=args.streams)
    publish(args.bundle, {**asdict(report), "failures": report.failures}, values, args.output)
    for failure in report.failures:
        print(f"FAILED: {failure}")
    return int(bool(report.failures))


if __name__ == "__main__":
    run_script(main)
