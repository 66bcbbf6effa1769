"""How fast do the runtimes load and recognise, and in how much memory? One thread each, on the clips of the demo model.

    python -m u2moe.benchmarks.runtimes.speed --cpp build/cpp/u2moe_transcribe [--repeats 5] [--output FILE]
    python -m u2moe.benchmarks.runtimes.speed --memory-minutes 60 [--real-time] --output FILE

Needs a quiet machine, `npm ci --ignore-scripts` in examples/browser, and Chromium. The second form adds to FILE how
much memory the page takes during an hour of speech, by its microphone (--real-time) or as fast as it is recognised.
"""

from __future__ import annotations

import functools
import statistics
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
from u2moe.benchmarks.runtimes.page_memory import SHORTEST_MINUTES, memory_of_page, renderers, trend_of
from u2moe.benchmarks.runtimes.python_program import Samples
from u2moe.benchmarks.runtimes.timing import Timing, peak_mb, run_timed
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.export.profiles.conversion import convert_bundle
from u2moe.runtime.model.settings import SessionSettings
from u2moe.runtime.recognizer import DEMO_FOLDER

RATE = 16_000
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
        commands: dict[str, tuple[list[str], Path | None]] = {
            "Python": ([sys.executable, "-m", "u2moe.benchmarks.runtimes.python_program", str(bundle)], None),
            "Node, onnxruntime-node": (programs.node_command(bundle, "node"), programs.node_folder()),
            "Node, WebAssembly": (programs.node_command(ort, "web"), programs.node_folder()),
        }
        if cpp:
            commands["C++"] = ([*programs.cpp_command(cpp, bundle), "--timing"], None)
        runs: dict[str, list[Timing]] = {name: [] for name in commands}
        for repeat in range(repeats):  # in turn, so that none has the machine in another state
            for name, (command, cwd) in commands.items():
                progress(f"{name}, {repeat + 1} of {repeats}")
                runs[name].append(run_timed(command, files, cwd))
        found["runtimes"] = {name: summary(timings, seconds) for name, timings in runs.items()}
        progress("Chromium")
        found |= _in_browser(bundle, recordings, folder, repeats, found["runtimes"], seconds)
    return found


def _session(file: Path) -> None:
    options = SessionSettings(kernels="onnxruntime").session_options()
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _median(repeats: int, call: Callable[[], object]) -> float:
    took = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        took.append(time.perf_counter() - begin)
    return round(statistics.median(took), 4)


def summary(timings: Sequence[Timing], seconds: float) -> dict[str, float]:
    """Medians of the times and the largest memory: `load` in seconds, `rtf`, `mb`."""
    return {
        "load": round(statistics.median(item.load for item in timings), 3),
        "rtf": round(statistics.median(item.took for item in timings) / seconds, 5),
        "mb": round(max(item.mb for item in timings)),
    }


def _in_browser(
    bundle: Path,
    recordings: Sequence[Samples],
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
        version, most = browser.version, max(map(peak_mb, renderers()), default=0.0)
    timings = [Timing(load=timed["load"], took=took, mb=most) for took in timed["took"]]
    runtimes["Chromium, WebAssembly"] = summary(timings, seconds)
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
        (name, f"{item['load']:.2f}", f"{item['rtf']:.4f}", f"{item['mb']:.0f}")
        for name, item in results.get("runtimes", {}).items()
    ]
    names = ("cold", "warm", "onnx_load", "ort_load", "model_mb", "ort_mb", "minutes", "memory_how", "memory_verdict",
             "memory_measured", "first_peak", "second_peak", "memory_slope", "memory_scatter",
             "num_segments")  # fmt: skip
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
        trend = trend_of(memory["samples"])
        shown |= {
            "minutes": str(memory["minutes"]),
            "memory_how": "in real time" if memory["real_time"] else "as fast as it recognises",
            "memory_measured": measured(memory),
            "memory_verdict": "flat" if trend.is_flat else "not flat",
            "first_peak": f"{trend.first_peak:.0f}",
            "second_peak": f"{trend.second_peak:.0f}",
            "memory_slope": f"{trend.slope:.1f}",
            "memory_scatter": f"{trend.scatter:.1f}",
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
    if args.memory_minutes is not None and args.memory_minutes < SHORTEST_MINUTES:
        parser.error(f"--memory-minutes must be at least {SHORTEST_MINUTES}: before, the page's sound grows")
    before = read_json(args.output) if args.output else {}
    if args.memory_minutes:
        memory = memory_of_page(args.bundle, args.memory_minutes, report, real_time=args.real_time)
        found = {"memory": {**measured_here(), **memory}}  # the rest was measured at another time
    else:
        found = {**measured_here(), **measure(args.bundle, args.cpp, args.repeats, report)}
    results = {**before, **found}
    if args.output:
        write_json(args.output, results)
    print(f"{measured(found.get('memory', found))}\n\n{values(results)['table']}")
    return 0


if __name__ == "__main__":
    run_script(main)
