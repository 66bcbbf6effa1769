"""A process that generates inputs of one kind from seeds, tries them and reports the outcomes; and its parent.

    python -m u2moe.benchmarks.endurance.worker KIND BUNDLE [--audio FILE...] [--configs TRAIN_YAML...]

reads a seed per line and writes "outcome<TAB>resident megabytes" per line. Output printed by libraries is an outcome,
too.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from u2moe.benchmarks.endurance.damaged_audio import use_damaged_audio, use_damaged_media
from u2moe.benchmarks.endurance.damaged_bundles import use_damaged_bundles
from u2moe.benchmarks.endurance.damaged_language_models import use_damaged_models
from u2moe.benchmarks.endurance.memory import resident_mb
from u2moe.benchmarks.endurance.odd_options import use_odd_options
from u2moe.benchmarks.script import run_script, script_parser
from u2moe.runtime import Recognizer, U2moeError
from u2moe.runtime.audio.folders import find_audio
from u2moe.runtime.audio.reading import read_audio

Use = Callable[[np.random.Generator], str]
"""Generates an input, tries it, and returns an outcome: "accepted", or "partly" if it was usable in part."""

REFUSALS: Mapping[str, tuple[type[Exception], ...]] = {
    "audio": (U2moeError,),
    "media": (U2moeError,),
    "bundles": (U2moeError,),
    "options": (U2moeError, ValueError),
    "models": (U2moeError,),
    "configs": (U2moeError,),
}
"""Documented errors, by kind of input."""
GOOD = ("refused", "accepted", "partly")
TIME_LIMIT_S = 20.0
"""Of an input: processor time, or time spent waiting for anything else. Waiting for a busy processor does not count."""
START_LIMIT_S = 120.0
_POLL_S = 0.5
MEMORY_GB = 8
"""Memory limit of a worker: beyond it allocations fail, which must also be reported with typed errors."""
_CLIP_S = 0.5
_MEMORY_EVERY = 200
"""Number of inputs between measurements of memory."""


def use_of(kind: str, bundle: Path, audio: Sequence[Path], configs: Sequence[Path], folder: Path) -> Use:
    """The function that tries inputs of a kind."""
    if kind == "configs":  # needs what the exporter needs
        from u2moe.benchmarks.endurance.damaged_configs import use_damaged_configs  # noqa: PLC0415

        return use_damaged_configs(configs, folder)
    recognizer = Recognizer.from_pretrained(bundle)
    rate = recognizer.bundle.manifest.features.sample_rate
    clips = [read_audio(file, rate)[: int(_CLIP_S * rate)] for file in find_audio(list(audio))]
    if kind == "audio":
        return use_damaged_audio(recognizer, clips, folder)
    if kind == "media":
        return use_damaged_media(recognizer, clips, folder)
    if kind == "models":
        return use_damaged_models(recognizer.vocabulary, folder)
    if kind == "bundles":
        return use_damaged_bundles(bundle, clips[0], folder)
    return use_odd_options(recognizer, clips[0])


def outcome_of(use: Callable[[], str], refusals: tuple[type[Exception], ...]) -> str:
    """Its return value, "refused", or the name of an undocumented error."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return use()
    except refusals:
        return "refused"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def answer(seeds: Iterable[str], use: Use, refusals: tuple[type[Exception], ...]) -> None:
    """Write an outcome for each seed, and nothing else, to standard output."""
    memory = f"{resident_mb():.1f}"
    with tempfile.TemporaryFile(buffering=0) as printed, os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(printed.fileno(), 1)
        print("ready", memory, sep="\t", file=lines, flush=True)
        for number, seed in enumerate(seeds):
            random = np.random.default_rng(int(seed))
            outcome = outcome_of(lambda random=random: use(random), refusals)  # type: ignore[misc]
            sys.stdout.flush()
            if size := printed.seek(0, os.SEEK_END):
                printed.seek(0)
                text = printed.read(min(size, 500)).decode(errors="replace")
                outcome = f"printed {' '.join(text.split())[:200]}"
                printed.truncate(0)
                printed.seek(0)
            if number % _MEMORY_EVERY == 0:
                memory = f"{resident_mb():.1f}"
            print(outcome.encode(errors="replace").decode(), memory, sep="\t", file=lines, flush=True)


class Worker:
    """The parent's side of a worker. Unix only, where pipes can be waited for."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        limit_s: float = TIME_LIMIT_S,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        """Start it.

        Args:
            command: arguments of the Python interpreter.
            limit_s: see `TIME_LIMIT_S`.
            environment: its environment; None: ours.
            log: file to which its stderr is appended; None: nowhere, as decoders complain about damaged files.
        """
        self.limit_s = limit_s
        with (log or Path(os.devnull)).open("ab") as complaints:
            self._process = subprocess.Popen(  # noqa: S603 - ourselves
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                env=environment,
            )
        self.ready = False

    def ask(self, seed: int) -> tuple[str, float | None]:
        """The outcome of an input, and resident megabytes; None once the process has ended."""
        if not self.ready:
            started, _ = self._reply(START_LIMIT_S)
            if started != "ready":
                raise RuntimeError(f"a worker did not start: {started}")
            self.ready = True
        if self._process.stdin is not None:
            self._process.stdin.write(f"{seed}\n".encode())
            self._process.stdin.flush()
        return self._reply(self.limit_s)

    def _reply(self, limit_s: float) -> tuple[str, float | None]:
        stdout, (begin_s, _), waited_s = self._process.stdout, self._spent(), 0.0
        while stdout is not None and not select.select([stdout], [], [], _POLL_S)[0]:
            spent_s, is_waiting = self._spent()
            waited_s += _POLL_S if is_waiting else 0.0
            if max(spent_s - begin_s, waited_s) > limit_s:
                self.close()
                return f"hangs: took more than {limit_s:g} s", None
        line = stdout.readline().decode() if stdout else ""
        if not line:
            self._process.wait()
            return f"the process ended with {self._process.returncode}", None
        outcome, memory = line.rstrip("\n").split("\t")
        return outcome, float(memory)

    def _spent(self) -> tuple[float, bool]:
        """CPU seconds, and whether it waits for anything other than a processor. Without /proc, wall-clock seconds."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except OSError:
            return time.monotonic(), False
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0] != "R"

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


class Workers:
    """A worker for each requested kind, replaced when it has ended."""

    def __init__(self, start: Callable[[str], Worker]) -> None:
        self._start = start
        self._running: dict[str, Worker] = {}

    def ask(self, kind: str, seed: int) -> tuple[str, float | None]:
        """See `Worker.ask`."""
        if kind not in self._running:
            self._running[kind] = self._start(kind)
        outcome, memory_mb = self._running[kind].ask(seed)
        if memory_mb is None:
            self._running.pop(kind).close()
        return outcome, memory_mb

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        for worker in self._running.values():
            worker.close()


def limit_memory() -> None:
    """Limit the memory of this process to `MEMORY_GB`; only on Unix."""
    if os.name == "posix":
        import resource  # noqa: PLC0415 - of Unix only

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GB << 30, MEMORY_GB << 30))


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer until the seeds end."""
    parser = script_parser("endurance.worker", __doc__)
    parser.add_argument("kind", choices=tuple(REFUSALS))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--audio", type=Path, nargs="*", default=[])
    parser.add_argument("--configs", type=Path, nargs="*", default=[])
    args = parser.parse_args(arguments)
    limit_memory()
    with tempfile.TemporaryDirectory() as folder:
        use = use_of(args.kind, args.bundle, args.audio, args.configs, Path(folder))
        answer(sys.stdin, use, REFUSALS[args.kind])


if __name__ == "__main__":
    run_script(main)
