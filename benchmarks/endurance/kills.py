"""Kills workers, drivers and whole machines of a run over a corpus, and looks whether every utterance is there once.

    python -m u2moe.benchmarks.endurance.kills WORK [--files 20000] [--kills 200]

Two "machines" (sessions of processes of their own) share one folder; what was killed is started again. The files must
be those of an undisturbed run, to the byte. Kills follow the progress of the run, so that they are spread over it.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import publish
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.claims import Claims
from u2moe.runtime.corpus.manifests import read_utterances
from u2moe.runtime.corpus.output_folder import OutputFolder
from u2moe.runtime.corpus.results import read_outcomes
from u2moe.runtime.recognizer import DEMO_FOLDER

RATE = 16_000
VICTIMS = ("worker", "driver", "machine")
"""One process that recognises; the one that directs these; all of a machine at once."""
_BLOCK_SIZE = 50
_MOST_BLOCKS = 2
"""Blocks that are finished between two kills, at most."""


@dataclass(kw_only=True)
class Report:
    """What was found.

    Attributes:
        num_files: utterances of the corpus, each a file of its own.
        audio_s: seconds of audio.
        kills: number of kills of each kind.
        num_starts: starts of machines.
        num_keys: different keys among the results.
        num_rows: rows of the results.
        num_blocks: files of results.
        num_different: of these, files that differ from those of the undisturbed run.
        num_failed: rows with an error.
        num_parts: unfinished files that killed processes left; a later run removes them after an hour.
        undisturbed_s: seconds that the undisturbed run took, on a machine that others used too.
        disturbed_s: seconds that the disturbed one took.
    """

    num_files: int
    audio_s: float = 0.0
    kills: dict[str, int] = field(default_factory=dict)
    num_starts: int = 0
    num_keys: int = 0
    num_rows: int = 0
    num_blocks: int = 0
    num_different: int = 0
    num_failed: int = 0
    num_parts: int = 0
    undisturbed_s: float = 0.0
    disturbed_s: float = 0.0

    @property
    def failures(self) -> list[str]:
        """What must not be."""
        found = {
            "keys are not there exactly once": self.num_keys != self.num_files or self.num_rows != self.num_files,
            "files differ from the undisturbed run": self.num_different > 0,
            "utterances failed": self.num_failed > 0,
        }
        return [text for text, holds in found.items() if holds]


def make_corpus(folder: Path, num_files: int) -> Path:
    """Short files cut out of the bundled clips, at random places and volumes, and a list of them."""
    rng = np.random.default_rng(0)
    clips = [read_audio(clip, RATE) for clip in sorted((DEMO_FOLDER / "clips").glob("*.flac"))]
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "list"
    with manifest.open("w", encoding="utf-8") as lines:
        for number in range(num_files):
            clip = clips[rng.integers(len(clips))]
            length = int(rng.uniform(0.3, 0.6) * RATE)
            start = int(rng.integers(max(len(clip) - length, 1)))
            file = folder / f"{number // 1000:03}" / f"{number:06}.wav"
            lines.write(f"{file.relative_to(folder)}\n")
            if not file.exists():
                file.parent.mkdir(exist_ok=True)
                soundfile.write(file, clip[start : start + length] * rng.uniform(0.3, 1), RATE)
    return manifest


class Machine:
    """A session of processes that works on a folder."""

    def __init__(self, manifest: Path, output: Path, num_workers: int) -> None:
        self._command = [
            *(sys.executable, "-m", "u2moe", "corpus", str(manifest), str(output)),
            *("--workers", str(num_workers), "--block-size", str(_BLOCK_SIZE)),
        ]
        self.start()

    def start(self) -> None:
        """Start it, with nothing of it left running."""
        self.process = subprocess.Popen(  # noqa: S603 - what is run is ours
            self._command, start_new_session=True, stderr=subprocess.DEVNULL
        )

    def kill(self, victim: str, rng: random.Random) -> bool:
        """Kill a part of it with SIGKILL; False if there is no such part at the moment."""
        try:
            if victim == "machine":
                os.killpg(self.process.pid, signal.SIGKILL)
            elif victim == "driver":
                self.process.kill()
            else:
                workers = _children(self.process.pid)
                if not workers:
                    return False
                os.kill(rng.choice(workers), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


def _children(process: int) -> list[int]:
    with suppress(OSError):
        return [int(text) for text in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def disturb(manifest: Path, output: Path, num_kills: int, found: Report) -> None:
    """Run to the end, with kills on the way."""
    rng = random.Random(0)  # noqa: S311 - no secret
    machines = [Machine(manifest, output, 1) for _ in range(2)]
    kills: Counter[str] = Counter()
    found.num_starts = len(machines)
    folder = OutputFolder(str(output))
    begin, wanted = time.monotonic(), 1
    try:
        while any(machine.process.poll() is None for machine in machines):
            time.sleep(rng.uniform(0.02, 0.3))
            if kills.total() < num_kills and len(folder.finished_blocks()) >= wanted:
                victim = rng.choice(VICTIMS)
                if rng.choice(machines).kill(victim, rng):
                    kills[victim] += 1
                    wanted = len(folder.finished_blocks()) + rng.randint(0, _MOST_BLOCKS)
                    if kills.total() % 20 == 0:
                        report(f"{kills.total()} kills, {len(folder.finished_blocks())} blocks")
            for machine in machines:
                if machine.process.poll() not in (None, 0):
                    machine.start()
                    found.num_starts += 1
    finally:
        for machine in machines:
            machine.process.kill()
            machine.process.wait()
    found.kills = dict(kills)
    found.disturbed_s = time.monotonic() - begin


def compare(output: Path, undisturbed: Path, found: Report) -> None:
    """Count keys, rows and files that differ."""
    folder = OutputFolder(str(output))
    keys: Counter[str] = Counter()
    for outcome in read_outcomes(folder):
        keys[outcome.key] += 1
        found.num_failed += outcome.error is not None
    expected = dict(OutputFolder(str(undisturbed)).contents())
    contents = dict(folder.contents())
    found.num_keys, found.num_rows, found.num_blocks = len(keys), keys.total(), len(contents)
    found.num_different = sum(contents.get(start) != content for start, content in expected.items())
    found.num_parts = sum(1 for _ in output.rglob(".*.part"))
    if Claims(str(folder.claims)).held():
        report("claims are left")


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show."""
    kills = results["kills"]
    rows = [
        ("files", f"{results['num_files']}, {results['audio_s'] / 3600:.1f} h"),
        ("kills", ", ".join(f"{kills.get(victim, 0)} of a {victim}" for victim in VICTIMS)),
        ("starts of a machine", str(results["num_starts"])),
        ("keys, rows", f"{results['num_keys']}, {results['num_rows']}"),
        ("files of results, of them different", f"{results['num_blocks']}, {results['num_different']}"),
        ("rows with an error", str(results["num_failed"])),
        ("unfinished files left, never read", str(results["num_parts"])),
    ]
    return {
        "table": table(("", "found"), rows),
        "kills": str(sum(kills.values())),
        "files": f"{results['num_files']:,}",
        "different": str(results["num_different"]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = script_parser("endurance.kills", __doc__)
    parser.add_argument("work", type=Path, help="folder for the corpus and the results")
    parser.add_argument("--files", type=int, default=20_000, metavar="N", help="files of the corpus (default: 20000)")
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="kills (default: 200)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    found = Report(num_files=args.files)
    manifest = make_corpus(args.work / "corpus", args.files)
    found.audio_s = sum(soundfile.info(str(item.source)).duration for item in read_utterances(manifest))
    report("corpus is there")
    begin = time.monotonic()
    Machine(manifest, args.work / "undisturbed", 2).process.wait()
    found.undisturbed_s = time.monotonic() - begin
    report(f"undisturbed: {found.undisturbed_s:.0f} s")
    disturb(manifest, args.work / "disturbed", args.kills, found)
    compare(args.work / "disturbed", args.work / "undisturbed", found)
    publish(DEMO_FOLDER, asdict(found), values, args.output)
    for failure in found.failures:
        print(f"FAILED: {failure}")
    return int(bool(found.failures))


if __name__ == "__main__":
    run_script(main)
