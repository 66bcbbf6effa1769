"""The subcommand `doctor`: print the installation details that a bug report needs."""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import soundfile

from u2moe.benchmarks.bench.check import describe_check, run_check
from u2moe.benchmarks.instruments.host import describe_machine
from u2moe.runtime import BundleError, Recognizer
from u2moe.runtime.audio.files import find_audio
from u2moe.runtime.bundle_location import find_bundle
from u2moe.runtime.cli.options import providers_in
from u2moe.runtime.cli.outputs import try_to_write
from u2moe.runtime.whole_file import write_text

_PACKAGES = (
    *("u2moe-demo", "u2moe-kernels", "soundfile", "soxr", "av"),
    *("onnx", "onnx-ir", "torch", "starlette", "pyarrow"),
)
_LONGEST_S = 3.0
_ABOUT = """Print versions, processor, kernels and providers, and run the demo model for three seconds. With --check,
instead run all graphs of a bundle on an execution provider, and compare the results with those on the CPU. This takes
minutes; the exit status is 1 if a difference exceeds its limit. The output names neither files nor this machine."""


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Add `u2moe doctor`."""
    parser.description = _ABOUT
    about = "with --check: the bundle (default: the demo model)"
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help=about)
    parser.add_argument("--check", action="store_true", help="compare the results of a provider with those of the CPU")
    about = "with --check: write the report as JSON (default: check.json)"
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=about)
    experts = parser.add_argument_group("for experts")
    experts.add_argument("--providers", metavar="NAMES", help="with --check: execution providers, separated by commas")
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """Describe the installation. Return exit status 1 if the demo model does not run or `--check` fails."""
    lines, code = list(_installation()), 0
    if args.check:
        file = args.output or Path("check.json")
        try_to_write(file)
        print("\n".join(lines), flush=True)
        report = run_check(args.bundle, providers_in(args))
        write_text(file, json.dumps(report, indent=1) + "\n")
        print(*describe_check(report), sep="\n")
        return 0 if report["passed"] else 1
    for name in ("bundle", "providers", "output"):
        if getattr(args, name) is not None:
            raise ValueError(f"{'BUNDLE' if name == 'bundle' else f'--{name}'} requires --check")
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
    """Run the demo model. Yield lines with the kernels, a digest of the recognised tokens, and the speed."""
    recognizer = Recognizer.from_pretrained(find_bundle(None))
    kernels = recognizer.model.kernels
    library = f", sha256 {hashlib.sha256(kernels.library.read_bytes()).hexdigest()[:16]}" if kernels.library else ""
    yield f"kernels: {kernels}{library}"
    clips = find_audio([find_bundle(None) / "clips"])
    tokens, audio_s, begin = "", 0.0, time.perf_counter()
    while not audio_s or time.perf_counter() - begin < _LONGEST_S:
        found = [recognizer.transcribe(clip) for clip in clips]
        tokens = repr([segment.tokens for transcript in found for segment in transcript.segments])
        audio_s += sum(transcript.duration for transcript in found)
    factor = (time.perf_counter() - begin) / audio_s
    yield f"demo model {recognizer.bundle.fingerprint[:16]}: tokens {hashlib.sha256(tokens.encode()).hexdigest()[:16]}"
    yield f"RTF {factor:.4f}, {1 / factor:.0f} times real time, 1 thread"
