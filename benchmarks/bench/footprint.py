"""Load time, memory and disk space of a bundle, measured in fresh processes."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from u2moe.benchmarks.instruments.host import status_bytes
from u2moe.benchmarks.instruments.statistics import Spread, interleaved
from u2moe.runtime import Bundle, SessionSettings

_CHILD = """
import sys, time
begin = time.perf_counter()
import u2moe.runtime
import_s = time.perf_counter() - begin
from u2moe.benchmarks.bench.footprint import report
report(import_s, *sys.argv[1:])
"""


def measure_footprint(
    bundles: Mapping[str, Bundle], audio: Path, *, settings: SessionSettings | None = None, repetitions: int = 3
) -> dict[str, dict[str, Any]]:
    """Measure load time and memory in fresh processes, in turn; docs/bench.md explains the result.

    Each process recognises the recording `audio` as a whole and, if the bundle can stream, as a stream. `settings` have
    no `sess_options`. For each bundle, an extra process first loads the files into the system's cache.
    """
    chosen = json.dumps(dataclasses.asdict(settings or SessionSettings()))

    def run(bundle: Bundle) -> dict[str, float]:
        command = [sys.executable, "-c", _CHILD, str(bundle.path), str(audio), chosen]
        return dict(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))  # noqa: S603 - ourselves

    cases = {name: partial(run, bundle) for name, bundle in bundles.items()}
    runs = interleaved(cases, repetitions, title="fresh process")
    result: dict[str, dict[str, Any]] = {}
    for name, found in runs.items():
        result[name] = {key: Spread.of([run[key] for run in found]).data() for key in found[0]}
        result[name]["disk"] = {"files": sum(file.size for file in bundles[name].manifest.files.values())}
    return result


def report(import_s: float, path: str, audio: str, settings: str) -> None:
    """Measure times and memory in a fresh process, and print them as JSON. docs/bench.md explains the values."""
    from u2moe.runtime import DecodingOptions, Recognizer  # noqa: PLC0415 - its import was timed before
    from u2moe.runtime.audio.reading import read_audio  # noqa: PLC0415

    memory = {"imported_bytes": status_bytes("VmHWM")}
    marks = [time.perf_counter()]
    bundle = Bundle.open(path)
    marks.append(time.perf_counter())
    model = bundle.load(SessionSettings(**json.loads(settings)))
    recognizer = Recognizer(bundle, model)
    marks.append(time.perf_counter())
    memory["loaded_bytes"] = status_bytes("VmHWM")
    samples = read_audio(audio, bundle.manifest.features.sample_rate)
    marks.append(time.perf_counter())
    recognizer.transcribe(samples)
    marks.append(time.perf_counter())
    if bundle.manifest.model.streaming and bundle.manifest.model.static is None:
        recognizer.transcribe(samples, options=DecodingOptions(chunk_size=16, num_left_chunks=4))
    memory["peak_bytes"] = status_bytes("VmHWM")
    verify_s, load_s, _, first_s = (after - before for before, after in pairwise(marks))
    times = {"import_s": import_s, "verify_s": verify_s, "load_s": load_s, "start_s": verify_s + load_s}
    sizes = {name: size for name, size in memory.items() if size is not None}
    print(json.dumps({**times, "first_s": first_s, **sizes}))
