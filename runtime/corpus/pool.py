"""Worker processes that recognise blocks of a list. A worker that dies is replaced, and its block is repeated.

Before a worker reads or decodes entries, it writes their indices to shared memory. If workers die repeatedly on the
same batch, its entries are decoded separately. If they die repeatedly on the same entry, its row contains an error.
"""

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from u2moe.runtime.corpus.entry import Block
from u2moe.runtime.corpus.recognition import BATCH_LEN, BlockDone, BlockRecognizer, Caution, ModelChoice, write_block
from u2moe.runtime.corpus.rows import RowMaker
from u2moe.runtime.corpus.run_folder import OutputFolder, RunDescription
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.recognizer import Recognizer

_TICK_S = 1.0
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_CRASHES = {-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL} if os.name == "posix" else set()
_MOST_CRASHES = 2
_MOST_KILLS = 5
"""Limits on crashes (`_MOST_CRASHES`) and other deaths (`_MOST_KILLS`) of workers on the same entries. If
the entries of a batch reach a limit, they are decoded separately; a single entry is left out. The limit on other deaths
is higher, because an operator or the out-of-memory killer may have caused them."""
_MOST_STARTS = 5


class _Report(ctypes.Structure):
    """A worker's progress on its block. The parent shares this memory."""

    _fields_ = (
        ("is_ready", ctypes.c_bool),
        ("num_utterances", ctypes.c_long),
        ("seconds", ctypes.c_double),
        ("num_attempted", ctypes.c_long),
        ("attempted", ctypes.c_long * BATCH_LEN),
    )


@dataclass(kw_only=True, eq=False)
class _Worker:
    """A worker process, and the block on which it works."""

    process: BaseProcess
    connection: connection.Connection
    report: Any
    num_starts: int = 1
    block: Block | None = None


class WorkerPool:
    """Worker processes: forks that share the memory of `recognizer`, or spawned ones if it is None. Close the pool."""

    def __init__(
        self, folder: str, run: RunDescription, model: ModelChoice, recognizer: Recognizer | None, num_workers: int
    ) -> None:
        self.num_deaths = 0  # workers that died and were replaced
        self._setup = (folder, run, model, recognizer)
        self._context = multiprocessing.get_context("spawn" if recognizer is None else "fork")
        self._cautions: dict[int, Caution] = {}
        self._workers = [self._start() for _ in range(num_workers)]

    def in_progress(self) -> tuple[int, float]:
        """Return the number of entries, and the seconds of audio, already recognised in unfinished blocks."""
        busy = [worker.report for worker in self._workers if worker.block is not None]
        return sum(report.num_utterances for report in busy), sum(report.seconds for report in busy)

    def run(self, blocks: Iterator[Block]) -> Iterator[BlockDone | None]:
        """See `Workers.run`. Raise CorpusError if workers die before they are ready, or a worker's error."""
        while True:
            for worker in self._workers:
                if worker.block is None and (block := next(blocks, None)) is not None:
                    self._assign(worker, block)
            busy = [worker for worker in self._workers if worker.block is not None]
            if not busy:
                return
            ready = connection.wait([worker.connection for worker in busy], timeout=_TICK_S)
            if not ready:
                yield None
            for worker in busy:
                if worker.connection in ready:
                    yield self._receive(worker)

    def close(self) -> None:
        """Kill all workers. Existing result files are complete."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        report = self._context.RawValue(_Report)
        process = self._context.Process(  # type: ignore[attr-defined]  # of either context
            target=_work, args=(*self._setup, theirs, report, os.getpid()), name="u2moe-corpus", daemon=True
        )
        with warnings.catch_warnings():
            # Ignore Python's warning about forks in a process with threads. The threads are those of OpenBLAS in numpy,
            # which stops them before a fork and restarts them.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        theirs.close()
        return _Worker(process=process, connection=ours, report=report)

    def _assign(self, worker: _Worker, block: Block) -> None:
        worker.block = block
        worker.report.num_utterances, worker.report.seconds, worker.report.num_attempted = 0, 0.0, 0
        with contextlib.suppress(ConnectionError):  # `_receive` handles a worker that has died
            worker.connection.send((block, self._cautions.get(block.number)))

    def _receive(self, worker: _Worker) -> BlockDone | None:
        try:
            message = worker.connection.recv()
        except (EOFError, ConnectionError):
            self._replace(worker)
            return None
        if isinstance(message, Exception):
            raise message
        done: BlockDone = message
        worker.block = None
        self._cautions.pop(done.number, None)
        return done

    def _replace(self, old: _Worker) -> None:
        """Replace a process that died. The new process repeats the block of the old one."""
        old.process.join()
        old.connection.close()
        exit_code, report = old.process.exitcode or 0, old.report
        if not report.is_ready and old.num_starts >= _MOST_STARTS:
            by_exception = "does the program call run_corpus only under `if __name__ == '__main__':`?"
            reason = by_exception if exit_code == 1 else "is there enough memory for the model?"
            raise CorpusError(f"worker processes die at startup ({_named(exit_code)}): {reason}")
        self.num_deaths += 1
        new = self._start()
        self._workers[self._workers.index(old)] = new
        new.num_starts = 1 if report.is_ready else old.num_starts + 1
        if old.block is not None:
            # Decide how to treat the entries that the old process worked on.
            attempt = tuple(report.attempted[: report.num_attempted])
            caution = self._cautions.setdefault(old.block.number, Caution())
            caution.deaths[attempt] += 1
            if caution.deaths[attempt] >= (_MOST_CRASHES if exit_code in _CRASHES else _MOST_KILLS):
                if len(attempt) == 1:
                    caution.left_out[attempt[0]] = f"left out: processes that recognised it died ({_named(exit_code)})"
                else:
                    caution.alone.update(attempt)
            self._assign(new, old.block)


def _work(
    path: str,
    run: RunDescription,
    model: ModelChoice,
    loaded: Recognizer | None,
    parent: connection.Connection,
    report: Any,
    parent_id: int,
) -> None:
    """Run a worker process. Recognise blocks from the connection until it closes or the parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes; the parent handles it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent_id,), daemon=True).start()

    def count(num_utterances: int, seconds: float) -> None:
        report.num_utterances += num_utterances
        report.seconds += seconds

    def attempt(indices: Sequence[int]) -> None:
        report.num_attempted = 0  # if the worker dies during the update, no entry is blamed
        report.attempted[: len(indices)] = indices
        report.num_attempted = len(indices)

    try:
        folder, rows = OutputFolder(path), RowMaker.of_run(run)
        loaded = loaded or model.load()
        recognizer = BlockRecognizer(loaded, rows, align=run.align, on_progress=count, on_attempt=attempt)
        report.is_ready = True
        while True:
            block, caution = parent.recv()
            parent.send(write_block(folder, block, recognizer.recognize(block.entries, caution)))
    except (EOFError, ConnectionError):  # the parent has ended; finished files are complete
        return
    except Exception as error:  # noqa: BLE001 - the parent raises it again
        error.add_note(traceback.format_exc())
        parent.send(error)


def _end_with(parent_id: int) -> None:
    """End this process when its parent ends. The pipe does not show that end: forked siblings keep the pipe open."""
    while os.getppid() == parent_id:
        time.sleep(_TICK_S)
    os._exit(1)


def may_fork() -> bool:
    """Return whether this process can be forked: only on Linux, and only if it has no other Python threads."""
    return os.name == "posix" and hasattr(os, "sched_getaffinity") and threading.active_count() == 1


def num_cores(quota: Path = _QUOTA) -> int:
    """Return the number of cores that this process may keep busy, at least 1. A container's CPU quota limits it."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no quota ("max"), or no container
        allowed, period = quota.read_text(encoding="ascii").split()
        count = min(count, math.ceil(int(allowed) / int(period)))
    return max(count, 1)


def _named(exit_code: int) -> str:
    other = f"exit status {exit_code}" if exit_code >= 0 else f"signal {-exit_code}"
    return next((each.name for each in signal.Signals if each == -exit_code), other)
