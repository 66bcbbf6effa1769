"""What computes the features? numpy, the graph of a bundle and kaldi-native-fbank: processor time, errors, processors.

    python -m u2moe.benchmarks.quality.front_end [--graph NAME=FILE ...] [--elsewhere NAME=COMMAND ...] [--output FILE]

Needs kaldi-native-fbank. `--graph` adds another features.onnx. COMMAND runs Python on another processor, for example
"qemu-x86_64 -cpu Haswell .venv/bin/python"; whether its features are the same to the last bit is part of the results.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import kaldi_native_fbank
import numpy as np
import numpy.typing as npt
import onnxruntime

from u2moe.benchmarks.instruments.statistics import interleaved
from u2moe.benchmarks.instruments.workload import speech
from u2moe.benchmarks.results.files import write_json
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import measured, measured_here
from u2moe.benchmarks.script import named, report, run_script, script_parser
from u2moe.runtime.bundle.bundle import Bundle
from u2moe.runtime.bundle.manifest import FeatureConfig
from u2moe.runtime.model.features import FLOOR, PREEMPHASIS, constants_of, fbank
from u2moe.runtime.model.settings import SessionSettings
from u2moe.runtime.recognizer import DEMO_FOLDER

Samples = npt.NDArray[np.float32]
Features = npt.NDArray[np.float32]
FrontEnd = Callable[[Samples], Features]
"""From samples [streams, n] to features [streams, frames, mel]."""

CHUNK = 64
"""Frames that a chunk of 16 encoder frames adds, with a subsampling rate of 4."""
STREAMS = (1, 8, 32, 128)
FILES_S = {"10 s": 10, "10 min": 600}
_ROUNDS = 9
_COLD = "one stream, caches cold"
_BLOCK_S = 10
"""Longest input of a graph in seconds: it keeps what it computes of all frames at once."""


def front_ends(graphs: Mapping[str, Path]) -> dict[str, FrontEnd]:
    """The front ends by name: numpy, the graphs, and kaldi-native-fbank."""
    config = Bundle.open(DEMO_FOLDER).manifest.features
    found: dict[str, FrontEnd] = {"numpy": lambda rows: np.stack([fbank(row, config) for row in rows])}
    found |= {name: _graph(file, config) for name, file in graphs.items()}
    found["kaldi-native-fbank"] = lambda rows: np.stack([_kaldi(row, config) for row in rows])
    return found


def _graph(file: Path, config: FeatureConfig) -> FrontEnd:
    session = onnxruntime.InferenceSession(str(file), SessionSettings(kernels="onnxruntime").session_options())
    step = _BLOCK_S * 1000 // round(config.frame_shift_ms)

    def features(rows: Samples) -> Features:
        num_frames = max(rows.shape[1] - config.frame_len + config.shift_len, 0) // config.shift_len
        starts = range(0, num_frames, step)
        ends = [(min(start + step, num_frames) - 1) * config.shift_len + config.frame_len for start in starts]
        blocks = (rows[:, start * config.shift_len : end] for start, end in zip(starts, ends, strict=True))
        return np.concatenate([session.run(None, {"samples": block})[0] for block in blocks], axis=1)

    return features


def _kaldi(samples: Samples, config: FeatureConfig) -> Features:
    """Features [frames, mel], as the runtime computed them with kaldi-native-fbank."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = config.sample_rate
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = config.num_mel_bins
    options.energy_floor = 0.0
    stream, parts, first = kaldi_native_fbank.OnlineFbank(options), list[Features](), 0
    for start in range(0, len(samples), _BLOCK_S * config.sample_rate):
        block = samples[start : start + _BLOCK_S * config.sample_rate] * np.float32(32768)
        stream.accept_waveform(config.sample_rate, block.data)
        frames = np.empty((stream.num_frames_ready - first, config.num_mel_bins), np.float32)
        for row in range(len(frames)):
            frames[row] = stream.get_frame(first + row)
        stream.pop(len(frames))
        first += len(frames)
        parts.append(frames)
    return np.concatenate(parts)


def exact(samples: Samples, config: FeatureConfig) -> npt.NDArray[np.longdouble]:
    """Kaldi's definition in extended precision, the Fourier transform by its own definition, too [frames, mel]."""
    constants, wide = constants_of(config), np.longdouble
    num_points, length = constants.num_points, config.frame_len
    turn = 2 * np.arccos(wide(-1)) / num_points
    angles = (np.outer(np.arange(length), np.arange(num_points // 2)) % num_points) * turn
    cosines, sines = np.cos(angles), np.sin(angles)
    banks, window = constants.banks().astype(wide), constants.window.astype(wide)
    frames = np.lib.stride_tricks.sliding_window_view(samples, length)[:: config.shift_len].astype(wide)
    frames -= frames.mean(axis=1, keepdims=True)
    frames[:, 1:] -= wide(PREEMPHASIS) * frames[:, :-1].copy()
    frames *= window
    energies = ((frames @ cosines) ** 2 + (frames @ sines) ** 2) @ banks
    log_energies: npt.NDArray[np.longdouble] = np.log(np.maximum(energies, wide(FLOOR)))
    return log_energies


def errors(ends: Mapping[str, FrontEnd], samples: Samples, config: FeatureConfig) -> dict[str, dict[str, float]]:
    """The `largest` and `mean` error, and the share of features whose `last_bits` are not those of the exact value."""
    expected = exact(samples, config)
    rounded = expected.astype(np.float32)
    found = {}
    for name, end in ends.items():
        features = end(samples[np.newaxis])[0]
        off = np.abs(features - expected).astype(np.float64)
        differing = float((features != rounded).mean())
        found[name] = {"largest": float(off.max()), "mean": float(off.mean()), "last_bits": differing}
    return found


def times(ends: Mapping[str, FrontEnd], samples: Samples, config: FeatureConfig) -> dict[str, dict[str, float]]:
    """Milliseconds of processor time per second of audio, by workload and front end: the least of some rounds."""
    window = (CHUNK - 1) * config.shift_len + config.frame_len
    chunk = samples[:window]
    loads = {f"{count} stream{'s' * (count > 1)}": np.stack([chunk] * count) for count in STREAMS}
    loads |= {name: np.resize(samples, seconds * config.sample_rate)[np.newaxis] for name, seconds in FILES_S.items()}
    found = {}
    for name, rows in {_COLD: chunk[np.newaxis], **loads}.items():
        audio_s = rows.shape[0] * (rows.shape[1] - config.frame_len + config.shift_len) / config.sample_rate
        repeats = 1 if name == _COLD else max(1, round(8 / audio_s))
        calls = {label: _spent(end, rows, repeats, cold=name == _COLD) for label, end in ends.items()}
        rounds = interleaved(calls, _ROUNDS * (5 if name == _COLD else 1))
        found[name] = {label: 1000 * min(values) / (repeats * audio_s) for label, values in rounds.items()}
    return found


def _spent(end: FrontEnd, rows: Samples, repeats: int, *, cold: bool) -> Callable[[], float]:
    """A function that returns the seconds of processor time of some calls."""
    weights = np.zeros(4_000_000)  # an encoder's, which leave nothing else in the cache

    def seconds() -> float:
        if cold:
            weights.sum()
        begin = time.process_time()
        for _ in range(repeats):
            end(rows)
        return time.process_time() - begin

    return seconds


def digests(ends: Mapping[str, FrontEnd], samples: Samples) -> dict[str, str]:
    """sha256 of the features by front end."""
    return {name: hashlib.sha256(end(samples[np.newaxis]).tobytes()).hexdigest() for name, end in ends.items()}


def same_elsewhere(command: str, graphs: Mapping[str, Path], here: Mapping[str, str]) -> dict[str, bool]:
    """Whether the features are the same to the last bit in another Python, by front end."""
    options = [part for name, file in graphs.items() for part in ("--graph", f"{name}={file}")]
    full = [*shlex.split(command), "-m", "u2moe.benchmarks.quality.front_end", "--digests", *options]
    done = subprocess.run(full, capture_output=True, text=True, check=True)  # noqa: S603
    return {name: digest == here[name] for name, digest in json.loads(done.stdout).items()}


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: times, errors, and where features are the same to the last bit."""
    names = list(results["errors"])
    loads = [(load, *(f"{own[name]:.2f}" for name in names)) for load, own in results["times"].items()]
    rows = [
        ("largest error", *(f"{results['errors'][name]['largest']:.1g}" for name in names)),
        ("mean error", *(f"{results['errors'][name]['mean']:.1g}" for name in names)),
        ("not the nearest number", *(f"{results['errors'][name]['last_bits']:.2%}" for name in names)),
        *(
            (where, *("same" if own[name] else "differs" for name in names))
            for where, own in results["elsewhere"].items()
        ),
    ]
    cold = results["times"][_COLD]
    return {
        "table": table(("ms per second of audio", *names), loads),
        "errors": table(("", *names), rows),
        "cold": f"{cold['numpy']:.2f}",
        "cold_kaldi": f"{cold['kaldi-native-fbank']:.2f}",
        "one": f"{results['times']['1 stream']['numpy']:.2f}",
        "many": f"{results['times']['128 streams']['numpy']:.2f}",
        "graph": f"{results['times']['1 stream']['features.onnx']:.2f}",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = script_parser("quality.front_end", __doc__)
    parser.add_argument("--graph", type=named, action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--elsewhere", type=named, action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--digests", action="store_true", help="only print the sha256 of the features, as JSON")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    others = {name: Path(file) for name, file in args.graph}
    config = Bundle.open(DEMO_FOLDER).manifest.features
    ends = front_ends({"features.onnx": DEMO_FOLDER / "features.onnx", **others})
    samples = speech(8, config.sample_rate)
    here = digests(ends, samples)
    if args.digests:
        json.dump(here, sys.stdout)
        return 0
    elsewhere = {}
    for name, command in args.elsewhere:
        report(name)
        elsewhere[name] = same_elsewhere(command, others, here)
    report("errors and times")
    found = {"errors": errors(ends, samples, config), "times": times(ends, samples, config), "elsewhere": elsewhere}
    results = {**measured_here(), **found}
    if args.output:
        write_json(args.output, results)
    shown = values(results)
    print(f"{measured(results)}\n\n{shown['table']}\n\n{shown['errors']}")
    return 0


if __name__ == "__main__":
    run_script(main)
