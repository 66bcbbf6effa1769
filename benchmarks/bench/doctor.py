"""The sub-command doctor: what a report of a problem needs to say about an installation, on one page."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import soundfile

from u2moe.benchmarks.instruments.host import describe_machine
from u2moe.runtime import BundleError, Recognizer
from u2moe.runtime.audio.files import find_audio
from u2moe.runtime.bundle_location import find_bundle

_PACKAGES = (
    *("u2moe-demo", "u2moe-kernels", "soundfile", "soxr", "av"),
    *("onnx", "onnx-ir", "torch", "starlette", "pyarrow"),
)
_LONGEST_S = 3.0


def add_doctor(subparsers: Any) -> None:
    """`u2moe doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="describe this installation, for a report of a problem",
        description="Print versions, processor, kernels and providers, and try the demo model for three seconds. "
        "Holds no names of files or of this machine.",
    )
    parser.set_defaults(run=run_doctor)


def run_doctor(_args: argparse.Namespace) -> int:
    """Print the page; exit code 1 if the demo model cannot be tried."""
    lines, code = list(_installation()), 0
    try:
        lines += _trial()
    except BundleError as error:
        lines, code = [*lines, f"demo model: {error}"], 1
    print("\n".join(lines))
    return code


def _installation() -> Iterator[str]:
    machine = describe_machine()
    yield f"u2moe {machine['u2moe']}, Python {machine['python']}, {machine['system']}"
    yield f"onnxruntime {machine['onnxruntime']}: {', '.join(machine['providers'])}"
    yield f"numpy {machine['numpy']}, {', '.join(f'{name} {_version(name)}' for name in _PACKAGES)}"
    yield f"libsndfile {soundfile.__libsndfile_version__}"
    yield f"processor: {machine['processor']}, {machine['usable_cores']} of {machine['num_cores']} cores"
    yield f"instruction sets: {' '.join(machine['instruction_sets']) or 'unknown'}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _trial() -> Iterator[str]:
    """The demo model's text on this machine, and its speed."""
    recognizer = Recognizer.from_pretrained(find_bundle(None))
    kernels = recognizer.model.kernels
    library = f", sha256 {hashlib.sha256(kernels.library.read_bytes()).hexdigest()[:16]}" if kernels.library else ""
    yield f"kernels: {kernels}{library}"
    clips = find_audio([find_bundle(None) / "clips"])
    tokens, audio_s, num_rounds, begin = "", 0.0, 0, time.perf_counter()
    while num_rounds == 0 or time.perf_counter() - begin < _LONGEST_S:
        found = [recognizer.transcribe(clip) for clip in clips]
        tokens = repr([segment.tokens for transcript in found for segment in transcript.segments])
        audio_s += sum(transcript.duration for transcript in found)
        num_rounds += 1
    factor = (time.perf_counter() - begin) / audio_s
    yield f"demo model {recognizer.bundle.fingerprint[:16]}: tokens {hashlib.sha256(tokens.encode()).hexdigest()[:16]}"
    yield f"RTF {factor:.4f}, {1 / factor:.0f} times real time, 1 thread"
