"""The other side of `engines`: starts a recogniser in its own process and sends it recordings. Times nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import soundfile

ENGINES = Path(__file__).with_name("engines.py")
PORTION_S = 0.1
"""Seconds of audio that a live source delivers at once."""
LAST_LINES = 5
SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Environment of child processes: by default most of these libraries start a thread for every core."""
NUM_STARTS = 3
"""Number of processes started to measure the loading time; the last one is kept."""


class PeerError(Exception):
    """A recogniser did not start, failed on a recording, or ended unexpectedly; the message is its last output."""


class PeerProcess:
    """A running recogniser. Not thread-safe.

    Attributes:
        started: its report when it was ready: load_s, versions.
        load_s: loading times, including those of processes started before it, see `timed`.

    Raises:
        PeerError: it did not start.
    """

    def __init__(self, engine: str, options: dict[str, Any], *, python: str | Path = sys.executable) -> None:
        command = [str(python), str(ENGINES), engine, json.dumps(options)]
        self.engine = engine
        # a pipe that is not read would block a verbose process
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(  # noqa: S603 - what is run is ours
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, encoding="utf-8"
        )
        try:
            self.started = self._reply()
        except PeerError:
            self.close()
            raise
        self.load_s = [float(self.started["load_s"])]

    @classmethod
    def timed(cls, engine: str, options: dict[str, Any], *, python: str | Path = sys.executable) -> Self:
        """A recogniser that was started several times, for a spread of `load_s`."""
        load_s: list[float] = []
        for _ in range(NUM_STARTS - 1):
            with cls(engine, options, python=python) as process:
                load_s += process.load_s
        process = cls(engine, options, python=python)
        process.load_s = [*load_s, *process.load_s]
        return process

    def recognise(self, wav: Path, portion_s: float = PORTION_S) -> dict[str, Any]:
        """The result of `engines.recognise` for a WAV file, with the peak memory of the process so far as peak_mb.

        Raises:
            PeerError: it failed, or has ended.
        """
        stdin = self._process.stdin
        if stdin is None:
            raise PeerError(f"{self.engine}: has no input")
        try:
            stdin.write(json.dumps({"wav": str(wav), "portion_s": portion_s}) + "\n")
            stdin.flush()
        except OSError as error:
            raise PeerError(f"{self.engine}: ended: {self._last_words()}") from error
        reply = self._reply()
        if "error" in reply:
            raise PeerError(f"{self.engine}: {wav.name}: {reply['error']}")
        return reply

    def _reply(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise PeerError(f"{self.engine}: ended: {self._last_words()}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _last_words(self) -> str:
        self._process.communicate()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return f"exit code {self._process.returncode}: {' | '.join(lines[-LAST_LINES:])[-600:]}"

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()


def write_wav(file: Path, samples: npt.NDArray[np.float32], sample_rate: int) -> Path:
    """Write samples, float32 in [-1, 1], as a WAV file that all engines can read; returns its path."""
    soundfile.write(file, samples, sample_rate, subtype="PCM_16")
    return file


@contextmanager
def single_core() -> Iterator[None]:
    """Child processes started within have one core and one thread."""
    before, cores = {name: os.environ.get(name) for name in SINGLE_THREAD}, os.sched_getaffinity(0)
    os.environ.update(SINGLE_THREAD)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
