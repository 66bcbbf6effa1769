"""Do damaged audio files and bundles ever do more than raise one of our errors? Any number of them, each from its seed.

    python -m u2moe.benchmarks.endurance.fuzz BUNDLE AUDIO... --inputs 10000 --output fuzz.json

Inputs are read in a child process: if one ends it, that is counted, and another goes on behind it.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from u2moe.benchmarks.endurance.memory import resident_mb
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import publish
from u2moe.benchmarks.script import run_script, script_parser
from u2moe.runtime import Bundle, Recognizer, U2moeError
from u2moe.runtime.audio import find_audio, read_audio
from u2moe.runtime.manifest import MANIFEST_FILE

FORMATS = (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"),
           ("AIFF", "PCM_24"), ("MP3", "MPEG_LAYER_III"), ("CAF", "PCM_16"), ("W64", "PCM_16"))  # fmt: skip
MEMORY_GB = 8
"""A child may not take more: beyond, allocations fail, and must be reported as ours too."""
_CLIP_S = 1.5
_ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 10**9, 2**63, 0.5, -0.5, 1e308, float("nan"), "", "x", "../tokens.txt", "/etc/passwd",
    [], {},
)  # fmt: skip
_NUM_REPORTED = 20


@dataclass(frozen=True, kw_only=True)
class FuzzReport:
    """What was tried and what came of it.

    Attributes:
        num_inputs: damaged audio files and bundles that were read, by kind.
        num_refused: those that raised one of our errors; `num_accepted`: those that were read all the same.
        num_failed: those that raised anything else, made a library print, or ended the process.
        failures: "kind seed: what happened" of the first of these.
        start_mb: resident megabytes of the child process after a tenth of the inputs; `end_mb`: at its end.
    """

    num_inputs: dict[str, int]
    num_refused: int
    num_accepted: int
    num_failed: int
    failures: list[str]
    start_mb: float
    end_mb: float


def fuzz(bundle: Path, audio: Sequence[Path], num_inputs: int) -> FuzzReport:
    """Read inputs 0 to `num_inputs` in child processes."""
    outcomes: list[tuple[str, str]] = []
    memory: list[float] = []
    while len(outcomes) < num_inputs:
        first = len(outcomes)
        command = [sys.executable, "-m", "u2moe.benchmarks.endurance.fuzz", str(bundle), *map(str, audio)]
        command += ["--inputs", str(num_inputs), "--child", str(first)]
        # Decoders write what they think of damaged files to stderr.
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:  # noqa: S603
            for line in child.stdout or ():
                kind, outcome, mb = line.rstrip("\n").split("\t")
                outcomes.append((kind, outcome))
                memory.append(float(mb))
        if child.returncode:
            outcomes.append((kind_of(len(outcomes)), f"the process ended with {child.returncode}"))
    failures = [f"{kind} {seed}: {outcome}" for seed, (kind, outcome) in enumerate(outcomes) if outcome not in _GOOD]
    results = Counter(outcome for _, outcome in outcomes)
    return FuzzReport(
        num_inputs=dict(Counter(kind for kind, _ in outcomes)),
        num_refused=results["refused"],
        num_accepted=results["accepted"],
        num_failed=len(failures),
        failures=failures[:_NUM_REPORTED],
        start_mb=memory[len(memory) // 10],
        end_mb=memory[-1],
    )


_GOOD = ("refused", "accepted")


def kind_of(seed: int) -> str:
    """What input `seed` is: two audio files, then a bundle."""
    return "bundle" if seed % 3 == 2 else "audio"


def read_inputs(bundle: Path, audio: Sequence[Path], seeds: range) -> Iterator[tuple[str, str]]:
    """Kind and outcome of each input."""
    recognizer = Recognizer.from_pretrained(bundle)
    rate = recognizer.bundle.manifest.features.sample_rate
    clips = [read_audio(file, rate)[: int(_CLIP_S * rate)] for file in find_audio(list(audio))]
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "original"
        shutil.copytree(bundle, original, ignore=shutil.ignore_patterns("clips", "*.py", "__pycache__", "*.md"))
        for seed in seeds:
            random = np.random.default_rng(seed)
            if kind_of(seed) == "audio":
                file = Path(folder) / "audio"
                file.write_bytes(damaged_audio(clips[int(random.integers(len(clips)))], rate, random))
                outcome = outcome_of(lambda file=file: recognizer.transcribe(file))  # type: ignore[misc]
            else:
                target = Path(folder) / "bundle"
                damage_bundle(original, target, random)
                clip = clips[0]
                outcome = outcome_of(lambda target=target, clip=clip: _use(target, clip))  # type: ignore[misc]
                shutil.rmtree(target)
            yield kind_of(seed), outcome


def answer(outcomes: Iterable[tuple[str, str]]) -> None:
    """Write outcomes to the standard output, as lines, and to it nothing else: what a library prints is a failure."""
    with tempfile.TemporaryFile(buffering=0) as printed, os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(printed.fileno(), 1)
        for kind, outcome in outcomes:
            sys.stdout.flush()
            if size := printed.seek(0, os.SEEK_END):
                printed.seek(0)
                text = printed.read(min(size, 500)).decode(errors="replace")
                outcome = f"printed {' '.join(text.split())[:200]}"  # noqa: PLW2901
                printed.truncate(0)
                printed.seek(0)
            print(kind, outcome, f"{resident_mb():.1f}", sep="\t", file=lines, flush=True)


def _use(bundle: Path, clip: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
    Recognizer(opened := Bundle.open(bundle), opened.load()).transcribe(clip)


def outcome_of(read: Callable[[], object]) -> str:
    """Whether it was "refused" or "accepted", or the name of an error that is not ours."""
    try:
        read()
    except U2moeError:
        return "refused"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "accepted"


def damaged_audio(clip: np.ndarray[tuple[int], np.dtype[np.float32]], rate: int, random: np.random.Generator) -> bytes:
    """A clip as a file of some format, with some of its bytes changed, or any bytes."""
    if random.random() < 0.02:
        return random.bytes(int(random.integers(0, 5000)))
    file_format, subtype = FORMATS[int(random.integers(len(FORMATS)))]
    with tempfile.TemporaryFile() as file:
        soundfile.write(file, clip, rate, subtype=subtype, format=file_format)
        file.seek(0)
        return damaged(file.read(), random)


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """Bytes cut off, overwritten, put in, taken out or repeated; half of the time among the first hundred."""
    data = bytearray(content)
    for _ in range(int(random.integers(1, 4))):
        end = len(data) if random.random() < 0.5 else min(100, len(data))
        place = int(random.integers(0, end + 1))
        length = int(2 ** random.uniform(0, 12))
        action = int(random.integers(5))
        if action == 0:
            del data[place:]
        elif action == 1:
            data[place : place + length] = random.bytes(len(data[place : place + length]))
        elif action == 2:
            data[place:place] = random.bytes(length)
        elif action == 3:
            del data[place : place + length]
        else:
            for bit in random.integers(0, 8, int(random.integers(1, 9))).tolist():
                if data:
                    data[int(random.integers(0, len(data)))] ^= 1 << bit
    return bytes(data)


def damage_bundle(original: Path, target: Path, random: np.random.Generator) -> None:
    """A copy with a changed manifest, or a changed, missing or exchanged file, with the old digest or a true one."""
    target.mkdir()
    names = [file.name for file in original.iterdir()]
    for name in names:
        os.link(original / name, target / name)
    action = int(random.integers(5))
    graphs = sorted(name for name in names if name != MANIFEST_FILE)
    name = graphs[int(random.integers(len(graphs)))]
    content = (original / name).read_bytes()
    if action == 0:
        _replace(target / MANIFEST_FILE, damaged((original / MANIFEST_FILE).read_bytes(), random))
    elif action == 1:
        manifest = json.loads((original / MANIFEST_FILE).read_text(encoding="utf-8"))
        _replace(target / MANIFEST_FILE, json.dumps(odd(manifest, random)).encode())
    elif action == 2 and random.random() < 0.2:
        (target / name).unlink()
    else:
        other = graphs[int(random.integers(len(graphs)))]
        is_exchanged = action == 2
        changed = (original / other).read_bytes() if is_exchanged else damaged(content, random)
        _replace(target / name, changed)
        if action > 2:
            manifest = json.loads((original / MANIFEST_FILE).read_text(encoding="utf-8"))
            manifest["files"][name] = {"sha256": hashlib.sha256(changed).hexdigest(), "size": len(changed)}
            _replace(target / MANIFEST_FILE, json.dumps(manifest).encode())


def odd(manifest: Any, random: np.random.Generator) -> Any:
    """A manifest with a value anywhere in it replaced by an odd one, taken away, or added."""
    changed = copy.deepcopy(manifest)
    place = changed
    while True:
        key = list(place)[int(random.integers(len(place)))]
        if not isinstance(place[key], dict) or not place[key] or random.random() < 0.1:
            break
        place = place[key]
    action = int(random.integers(4))
    value = _ODD_VALUES[int(random.integers(len(_ODD_VALUES)))]
    if action == 0:
        del place[key]
    elif action == 1:
        place["odd"] = value
    else:
        place[key] = value
    return changed


def _replace(file: Path, content: bytes) -> None:
    """Not through the link: the original stays."""
    file.unlink()
    file.write_bytes(content)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = script_parser("endurance.fuzz", __doc__)
    parser.add_argument("bundle", type=Path, help="folder of a bundle")
    parser.add_argument("audio", type=Path, nargs="+", help="audio files, and folders of them")
    parser.add_argument("--inputs", type=int, default=1000, help="default: 1000")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child is not None:
        limit_memory()
        answer(read_inputs(args.bundle, args.audio, range(args.child, args.inputs)))
        return 0
    report = fuzz(args.bundle, args.audio, args.inputs)
    publish(args.bundle, asdict(report), values, args.output)
    return int(report.num_failed > 0)


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: the counts, and each failure."""
    kinds = {"audio": "audio files", "bundle": "bundles"}
    counts = [results[name] for name in ("num_refused", "num_accepted", "num_failed")]
    header = ("refused with a typed error", "read all the same", "anything else", "memory after a tenth, at the end")
    row = (*counts, f"{results['start_mb']:.0f}, {results['end_mb']:.0f} MB")
    return {
        "table": "\n\n".join([table(header, [row], left=0), *(f"`{failure}`" for failure in results["failures"])]),
        "tried": ", ".join(f"{num} {kinds[kind]}" for kind, num in results["num_inputs"].items()),
        "failed": str(results["num_failed"]),
        "start_mb": f"{results['start_mb']:.0f}",
        "end_mb": f"{results['end_mb']:.0f}",
    }


def limit_memory() -> None:
    """No more than MEMORY_GB for this process."""
    if os.name == "posix":
        import resource  # noqa: PLC0415 - of Unix only

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GB << 30, MEMORY_GB << 30))


if __name__ == "__main__":
    run_script(main)
