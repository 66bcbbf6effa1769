"""How fast do the runtimes load and recognise, and in how much memory? One thread each, on the clips of the demo model.

    python -m u2moe.benchmarks.runtimes.speed --cpp build/cpp/u2moe_transcribe [--repeats 5] [--output FILE]
    python -m u2moe.benchmarks.runtimes.speed --memory-minutes 60 [--real-time] --output FILE

Needs a quiet machine, `npm ci --ignore-scripts` in examples/browser, and Chromium. The second form adds to FILE how
much memory the page takes during an hour of speech, by its microphone (--real-time) or as fast as it is recognised.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from u2moe.benchmarks.results.files import read_json, write_json
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import measured, measured_here, of_bundle
from u2moe.benchmarks.runtimes import programs
from u2moe.benchmarks.runtimes.equality import recordings_of
from u2moe.benchmarks.runtimes.page_memory import memory_of_page
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.export.profiles.conversion import convert_bundle
from u2moe.runtime.recognizer import DEMO_FOLDER
from u2moe.runtime.session import SessionSettings

RATE = 16_000
_LOOK_S = 0.01
_PYTHON = """
import json, sys, time
from pathlib import Path
import soundfile
begin = time.perf_counter()
from u2moe.benchmarks.runtimes.programs import in_python
from u2moe.runtime import Recognizer
bundle, *files = sys.argv[1:]
Recognizer.from_pretrained(bundle)
load = time.perf_counter() - begin
samples = [soundfile.read(file, dtype="int16")[0] for file in files]
in_python(bundle, samples)
begin = time.perf_counter()
in_python(bundle, samples)
took = time.perf_counter() - begin
from u2moe.benchmarks.runtimes.speed import peak_mb
print(json.dumps({"load": load, "took": took, "mb": peak_mb(Path("/proc/self"))}))
"""
_RTF = """async ({ bundle, files, repeats }) => {
  const { Recognizer } = await import('./u2moe/index.js');
  const ort = await import('./ort/ort.wasm.bundle.min.mjs');
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { wasm: new URL('./ort/ort-wasm-simd-threaded.wasm', location.href).href };
  const begin = performance.now();
  const recognizer = await Recognizer.fromBundle(bundle, { ort, cache: null });
  const load = (performance.now() - begin) / 1000;
  const took = [];
  for (let repeat = 0; repeat <= repeats; repeat += 1) {
    let sum = 0;
    for (const file of files) {
      const samples = new Int16Array(await (await fetch(file)).arrayBuffer());
      const start = performance.now();
      await recognizer.transcribe(samples, recognizer.sampleRate, { chunkSize: 16, numLeftChunks: 4 });
      sum += performance.now() - start;
    }
    if (repeat) took.push(sum / 1000);
  }
  return { load, took };
}"""


def measure(
    bundle: Path, cpp: str | None, repeats: int, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Times in seconds and memory in MB.

    Returns:
        `loads`: of the encoder by format, native; `cold`, `warm`: of the page, from navigation to ready; `runtimes`:
        `load`, `rtf` and `mb` (peak of the process) of each; `seconds` of audio; `browser`: version; `sizes` of what a
        page loads.
    """
    recordings = recordings_of([], None, RATE)
    seconds = sum(map(len, recordings)) / RATE
    found: dict[str, Any] = {"seconds": round(seconds, 2), "runtimes": {}, **of_bundle(bundle)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = programs.write_wav(folder, recordings, RATE)
        ort = convert_bundle(bundle, folder / "ort", "ort").path
        found["loads"] = {
            kind: _median(repeats, functools.partial(_session, file))
            for kind, file in (("onnx", bundle / "encoder.onnx"), ("ort", ort / "encoder.ort"))
        }
        progress("Python")
        lines = [_run([sys.executable, "-c", _PYTHON, bundle, *files]) for _ in range(repeats)]
        found["runtimes"]["Python"] = _of_lines([json.loads(line) for line in lines], seconds)
        if cpp:
            progress("C++")
            found["runtimes"]["C++"] = _of_program(
                [cpp, "--json", "--left-chunks", "4", bundle], files, seconds, repeats
            )
        for runtime, label in (("node", "Node, onnxruntime-node"), ("web", "Node, WebAssembly")):
            progress(label)
            source = bundle if runtime == "node" else ort
            runs = [programs.in_node(source, [*files, *files], runtime)[1] for _ in range(repeats)]
            found["runtimes"][label] = _of_node(runs, len(files), seconds)
        progress("Chromium")
        found |= _in_browser(bundle, recordings, folder, repeats, found["runtimes"], seconds)
    return found


def _session(file: Path) -> None:
    onnxruntime.InferenceSession(file, SessionSettings().session_options(), providers=["CPUExecutionProvider"])


def _median(repeats: int, call: Callable[[], object]) -> float:
    took = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        took.append(time.perf_counter() - begin)
    return round(statistics.median(took), 4)


def _run(command: Sequence[object]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)  # noqa: S603
    return done.stdout


def _of_lines(lines: Sequence[Mapping[str, float]], seconds: float) -> dict[str, float]:
    return {
        "load": round(statistics.median(line["load"] for line in lines), 3),
        "rtf": round(statistics.median(line["took"] for line in lines) / seconds, 5),
        "mb": round(max(line["mb"] for line in lines)),
    }


def _of_node(runs: Sequence[Sequence[Mapping[str, Any]]], num_files: int, seconds: float) -> dict[str, float]:
    """The second time that each file was recognised."""
    lines = [
        {
            "load": run[0]["loadMs"] / 1000,
            "took": sum(line["ms"] for line in run[num_files:]) / 1000,
            "mb": max(line["rss"] for line in run) / 1e6,
        }
        for run in runs
    ]
    return _of_lines(lines, seconds)


def _of_program(command: Sequence[object], files: Sequence[Path], seconds: float, repeats: int) -> dict[str, float]:
    """A program that loads for each file: its time beyond that for an empty recording."""
    lines = []
    for _ in range(repeats):
        empty, took, most = 0.0, 0.0, 0.0
        for file in (None, *files):
            begin = time.perf_counter()
            process = subprocess.Popen(  # noqa: S603
                [*map(str, command), *(["--raw", "/dev/null"] if file is None else [str(file)])],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            while process.poll() is None:
                most = max(most, peak_mb(Path(f"/proc/{process.pid}")))
                time.sleep(_LOOK_S)
            spent = time.perf_counter() - begin
            empty, took = (spent, took) if file is None else (empty, took + spent - empty)
        lines.append({"load": empty, "took": max(took, 0.0), "mb": most})
    return _of_lines(lines, seconds)


def peak_mb(process: Path) -> float:
    """Most memory of a process in MB, by its folder in /proc.

    What `wait` reports may be that of its parent, before it became another program.
    """
    try:
        lines = (process / "status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1000
    except (OSError, StopIteration):  # it has just ended
        return 0.0


def _in_browser(
    bundle: Path,
    recordings: Sequence[programs.Samples],
    folder: Path,
    repeats: int,
    runtimes: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    site = folder / "site"
    programs.make_site(site, bundle)
    names = [f"{number}.pcm" for number in range(len(recordings))]
    for name, samples in zip(names, recordings, strict=True):
        (site / name).write_bytes(samples.tobytes())
    cold: list[float] = []
    warm: list[float] = []
    with programs.host(site) as url, programs.chromium() as browser:
        for _ in range(repeats):
            context = browser.new_context()
            page = context.new_page()
            for times in (cold, warm):
                begin = time.perf_counter()
                page.goto(url)
                page.wait_for_selector("body.ready", timeout=120_000)
                times.append(time.perf_counter() - begin)
            context.close()
        page = browser.new_page()
        page.set_default_timeout(0)
        page.goto(f"{url}favicon.svg")
        timed = page.evaluate(_RTF, {"bundle": f"{url}model/", "files": names, "repeats": repeats})
        version = browser.version
    runtimes["Chromium, WebAssembly"] = {
        "load": round(timed["load"], 3),
        "rtf": round(statistics.median(timed["took"]) / seconds, 5),
        "mb": None,
    }
    sizes = {name: sum(file.stat().st_size for file in (site / name).iterdir()) for name in ("model", "ort")}
    return {
        "cold": round(statistics.median(cold), 3),
        "warm": round(statistics.median(warm), 3),
        "browser": version,
        "sizes": sizes,
    }


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show."""
    rows = [
        (name, f"{item['load']:.2f}", f"{item['rtf']:.4f}", "" if item["mb"] is None else f"{item['mb']:.0f}")
        for name, item in results.get("runtimes", {}).items()
    ]
    names = ("cold", "warm", "onnx_load", "ort_load", "model_mb", "ort_mb", "minutes", "memory_first", "memory_last",
             "memory_most", "num_segments")  # fmt: skip
    shown = dict.fromkeys(names, "(not yet measured)")  # the two parts are measured one after the other
    shown["table"] = table(("runtime", "load, s", "real-time factor", "peak memory, MB"), rows)
    if "cold" in results:
        shown |= {
            "cold": f"{results['cold']:.1f}",
            "warm": f"{results['warm']:.1f}",
            "onnx_load": f"{1000 * results['loads']['onnx']:.0f}",
            "ort_load": f"{1000 * results['loads']['ort']:.0f}",
            "model_mb": f"{results['sizes']['model'] / 1e6:.1f}",
            "ort_mb": f"{results['sizes']['ort'] / 1e6:.1f}",
        }
    if memory := results.get("memory"):
        sizes = [size for _, size in memory["samples"]]
        shown |= {
            "minutes": str(memory["minutes"]),
            "memory_first": f"{sizes[0]:.0f}",
            "memory_last": f"{sizes[-1]:.0f}",
            "memory_most": f"{max(sizes):.0f}",
            "num_segments": str(memory["num_segments"]),
        }
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = script_parser("runtimes.speed", __doc__)
    parser.add_argument("--bundle", type=Path, default=DEMO_FOLDER)
    parser.add_argument("--cpp", metavar="PROGRAM", help="the program of examples/cpp")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-minutes", type=int, metavar="N", help="measure only memory, over N minutes of audio")
    parser.add_argument("--real-time", action="store_true", help="with --memory-minutes: by the browser's microphone")
    parser.add_argument("--output", type=Path, help="JSON file to write, or to add to")
    args = parser.parse_args(arguments)
    before = read_json(args.output) if args.output else {}
    if args.memory_minutes:
        found = {"memory": memory_of_page(args.bundle, args.memory_minutes, report, real_time=args.real_time)}
    else:
        found = measure(args.bundle, args.cpp, args.repeats, report)
    results = {**before, **measured_here(), **found}
    if args.output:
        write_json(args.output, results)
    print(f"{measured(results)}\n\n{values(results)['table']}")
    return 0


if __name__ == "__main__":
    run_script(main)
