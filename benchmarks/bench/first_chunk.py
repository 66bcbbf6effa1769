"""What does starting cost? Import, load, and the first chunk and first final result with and without `warm_up`.

    python -m u2moe.benchmarks.bench.first_chunk [BUNDLE] [--audio FILE_OR_FOLDER] [--runs 7]

Each run is a fresh process that streams all recordings as one, twice; half of the runs call `warm_up`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.results.files import write_json
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import measured_here
from u2moe.benchmarks.script import run_script, script_parser
from u2moe.runtime import DecodingOptions, Recognizer
from u2moe.runtime.audio.folders import find_audio
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.recognizer import DEMO_FOLDER

OPTIONS = DecodingOptions(chunk_size=16, num_left_chunks=4)
_CHILD = """
import sys, time
begin = time.perf_counter()
import u2moe.runtime
import_s = time.perf_counter() - begin
from u2moe.benchmarks.bench.first_chunk import measure
measure(import_s, *sys.argv[1:])
"""


def measure(import_s: float, bundle: str, audio: str, warm: str) -> None:
    """The work of a fresh process; prints JSON."""
    begin = time.perf_counter()
    recognizer = Recognizer.from_pretrained(bundle, options=OPTIONS)
    load_s = time.perf_counter() - begin
    rate = recognizer.bundle.manifest.features.sample_rate
    samples = np.concatenate([read_audio(file, rate) for file in find_audio([Path(audio)])])
    begin = time.perf_counter()
    if warm == "warm":
        recognizer.warm_up()
    warm_up_ms = 1000 * (time.perf_counter() - begin)
    first, second = _stream(recognizer, samples), _stream(recognizer, samples)
    print(
        json.dumps(
            {
                "import_s": import_s,
                "load_s": load_s,
                "warm_up_ms": warm_up_ms,
                "first_chunk_ms": first[0],
                "steady_chunk_ms": statistics.median(second[1:-1]),
                "first_final_ms": first[-1],
                "second_final_ms": second[-1],
            }
        )
    )


def _stream(recognizer: Recognizer, samples: npt.NDArray[np.float32]) -> list[float]:
    """Milliseconds for each chunk after its last sample has arrived; the last value is for the final result."""
    stream, times, num_frames = recognizer.create_stream(), [], 0
    rate = recognizer.bundle.manifest.features.sample_rate
    for portion in np.array_split(samples, max(50 * len(samples) // rate, 1)):
        begin = time.perf_counter()
        stream.accept_waveform(rate, portion)
        recognizer.decode_streams([stream])
        stream.get_result()
        if stream.source.num_frames > num_frames:
            times.append(1000 * (time.perf_counter() - begin))
            num_frames = stream.source.num_frames
    begin = time.perf_counter()
    stream.input_finished()
    recognizer.decode_streams([stream])
    return [*times, 1000 * (time.perf_counter() - begin)]


def first_chunk(bundle: Path, audio: Path, num_runs: int) -> dict[str, float]:
    """Measure in fresh processes, cold and warm in turn.

    Returns:
        Medians over runs, and `num_runs` of each kind: import_s, of `u2moe.runtime` with all that it needs; load_s, of
        `Recognizer.from_pretrained`; warm_up_ms; `first_chunk_..._ms` and `first_final_..._ms` of a process, cold and
        warm (after `warm_up`); steady_chunk_ms, of later chunks, and second_final_ms, of the same utterance again.

    Raises:
        subprocess.CalledProcessError: a run failed.
    """
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(num_runs):
        for warm, runs in found.items():
            command = [sys.executable, "-c", _CHILD, str(bundle), str(audio), warm]
            runs.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))  # noqa: S603

    def median(name: str, *kinds: str) -> float:
        return statistics.median(run[name] for kind in kinds for run in found[kind])

    return {
        "num_runs": num_runs,
        **{name: median(name, *found) for name in ("import_s", "load_s", "steady_chunk_ms", "second_final_ms")},
        "warm_up_ms": median("warm_up_ms", "warm"),
        **{
            f"{name}_{kind}_ms": median(f"{name}_ms", kind) for name in ("first_chunk", "first_final") for kind in found
        },
    }


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each step, how many processes there were, and where."""
    found = results["first_chunk"]

    def both(name: str) -> str:
        return ", ".join(f"{found[f'{name}_{kind}_ms']:.1f}" for kind in ("cold", "warm")) + " ms"

    rows = [
        ("import of `u2moe.runtime`", f"{found['import_s']:.2f} s"),
        ("load", f"{found['load_s']:.2f} s"),
        ("`warm_up()`", f"{found['warm_up_ms']:.0f} ms"),
        ("first chunk, without and with it", both("first_chunk")),
        ("later chunks", f"{found['steady_chunk_ms']:.1f} ms"),
        ("first final result, without and with it", both("first_final")),
        ("later ones", f"{found['second_final_ms']:.1f} ms"),
    ]
    machine = results["machine"]
    return {
        "table": table(("step", "takes"), rows),
        "processes": str(2 * found["num_runs"]),
        "machine": f"{machine['processor']}, onnxruntime {machine['onnxruntime']}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("bench.first_chunk", __doc__)
    parser.add_argument("bundle", type=Path, nargs="?", default=DEMO_FOLDER, help="folder of a bundle (default: demo)")
    parser.add_argument("--audio", type=Path, default=DEMO_FOLDER / "clips", help="file or folder, over 3 seconds")
    parser.add_argument("--runs", type=int, default=7, help="processes of each kind (default: 7)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    results = {**measured_here(), "first_chunk": first_chunk(args.bundle, args.audio, args.runs)}
    if args.output:
        write_json(args.output, results)
    print(values(results)["table"])


if __name__ == "__main__":
    run_script(main)
