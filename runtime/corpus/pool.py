"""Worker processes: blocks go to those that are idle; one that dies is replaced and its block done again.

A file that kills the process which reads it, whatever the reason, would do so for ever. Where a process has died the
block is repeated carefully: the worker names each utterance before it touches it. One at which processes die again
becomes a row with an error; of several that were decoded together each is then decoded alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import TYPE_CHECKING, Self

from u2moe.runtime.corpus.block_recognizer import Caution
from u2moe.runtime.corpus.block_writer import BlockDone
from u2moe.runtime.corpus.cores import cores_of
from u2moe.runtime.corpus.worker import Attempt, Progress, Stopped, WorkerSetup, work
from u2moe.runtime.errors import CorpusError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from u2moe.runtime.corpus.blocks import Block

_TICK_S = 1.0
_CRASHES = {-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL} if os.name == "posix" else set()
_MOST_CRASHES = 2
_MOST_KILLS = 4
"""Deaths at one utterance, after a first one anywhere in the block, until it is left out. A crash is a reason; a kill
may have come from outside (an operator, another process that ran out of memory)."""
_MOST_STARTS = 5
_NOTHING = Progress(num_utterances=0, seconds=0.0)


@dataclass(frozen=True, kw_only=True)
class Died:
    """A worker died and was replaced.

    Attributes:
        exit_code: that of its process; negative for a signal.
        lost: what it had reported of the block, which is now done again.
    """

    exit_code: int
    lost: Progress


Event = BlockDone | Progress | Died | None
"""What the pool reports; None: nothing happened for about a second."""


@dataclass(kw_only=True)
class _Trouble:
    """Deaths at a block."""

    deaths: Counter[tuple[int, ...]] = field(default_factory=Counter)
    left_out: dict[int, str] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)
    attempt: tuple[int, ...] = ()

    def blame(self, exit_code: int) -> None:
        """Take notice of a death at the last attempt."""
        self.deaths[self.attempt] += 1
        most = _MOST_CRASHES if exit_code in _CRASHES else _MOST_KILLS
        if not self.attempt or self.deaths[self.attempt] < most:
            return
        if len(self.attempt) == 1:
            self.left_out[self.attempt[0]] = f"left out: the process that recognised it died ({_named(exit_code)})"
        else:
            self.alone.update(self.attempt)

    def caution(self) -> Caution:
        self.attempt = ()
        return Caution(left_out=dict(self.left_out), alone=frozenset(self.alone))


@dataclass(kw_only=True)
class _Place:
    """The place of a worker: its process, the block that it works on, and what it has done of that."""

    number: int
    process: BaseProcess
    connection: connection.Connection
    block: Block | None = None
    done: Progress = _NOTHING
    num_deaths: int = 0


class WorkerPool:
    """A fixed number of worker processes. Close it, or use it in a `with` block.

    A model that can be forked is loaded once and shared by all workers, page by page, as they do not change it;
    otherwise each loads its own.

    Args:
        setup: what workers need; with a `recognizer`, they are forked.
        num_workers: number of processes.
    """

    def __init__(self, setup: WorkerSetup, num_workers: int) -> None:
        self._setup = setup
        self._context = multiprocessing.get_context("spawn" if setup.recognizer is None else "fork")
        self._num_workers = num_workers
        self._trouble: dict[int, _Trouble] = {}
        self._places = [self._start(number) for number in range(num_workers)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, blocks: Iterator[Block]) -> Iterator[Event]:
        """Have all blocks done; yields what happens. The next block is asked for when a worker is idle.

        Raises:
            CorpusError: workers die before they have begun.
            Exception: that of a worker that cannot go on, such as OSError for a full disk.
        """
        is_exhausted = False
        while True:
            for place in self._places:
                if place.block is None and not is_exhausted:
                    block = next(blocks, None)
                    is_exhausted = block is None
                    if block is not None:
                        self._assign(place, block)
            busy = {place.connection: place for place in self._places if place.block is not None}
            if not busy:
                return
            ready = connection.wait(list(busy), timeout=_TICK_S)
            if not ready:
                yield None
            for end in ready:
                event = self._receive(busy[end])  # type: ignore[index]  # wait returns what it was given
                if event is not None:
                    yield event

    def close(self) -> None:
        """End all workers at once; what they have written is whole."""
        for place in self._places:
            place.process.kill()
        for place in self._places:
            place.process.join()
            place.connection.close()

    def _start(self, number: int) -> _Place:
        ours, theirs = self._context.Pipe()
        cores = cores_of(number, self._num_workers, self._setup.model.num_threads)
        process = self._context.Process(  # type: ignore[attr-defined]  # of either context
            target=work, args=(self._setup, theirs, cores), name=f"u2moe-corpus-{number}", daemon=True
        )
        with warnings.catch_warnings():
            # Python warns of threads. Those of numpy's OpenBLAS are stopped before a fork and started after it.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        theirs.close()
        return _Place(number=number, process=process, connection=ours)

    def _assign(self, place: _Place, block: Block) -> None:
        place.block, place.done = block, _NOTHING
        trouble = self._trouble.get(block.number)
        with contextlib.suppress(ConnectionError):  # a worker that has died meanwhile shows where its messages end
            place.connection.send((block, trouble.caution() if trouble else None))

    def _receive(self, place: _Place) -> Event:
        try:
            message = place.connection.recv()
        except (EOFError, ConnectionError):
            return self._replace(place)
        place.num_deaths = 0
        if isinstance(message, Stopped):
            raise message.error
        if isinstance(message, Attempt):
            if place.block is not None and place.block.number in self._trouble:
                self._trouble[place.block.number].attempt = message.indices
            return None
        if isinstance(message, Progress):
            place.done += message
        if isinstance(message, BlockDone):
            place.block = None
            self._trouble.pop(message.number, None)
        found: Event = message
        return found

    def _replace(self, place: _Place) -> Died:
        """Start another process in the place of one that died, and have it do the block."""
        place.process.join()
        place.connection.close()
        exit_code = place.process.exitcode or 0
        if place.num_deaths >= _MOST_STARTS:
            reason = "is there memory for the model?"
            if exit_code == 1:  # as of an exception of Python's
                reason = "does the program call run_corpus only under `if __name__ == '__main__':`?"
            raise CorpusError(f"worker processes die as they begin ({_named(exit_code)}): {reason}")
        block, lost = place.block, place.done
        new = self._start(place.number)
        place.process, place.connection, place.num_deaths = new.process, new.connection, place.num_deaths + 1
        if block is not None:
            trouble = self._trouble.setdefault(block.number, _Trouble())
            trouble.blame(exit_code)
            self._assign(place, block)
        return Died(exit_code=exit_code, lost=lost)


def may_fork() -> bool:
    """Whether this process can be forked: on Linux, with no threads of Python's."""
    return os.name == "posix" and hasattr(os, "sched_getaffinity") and threading.active_count() == 1


def _named(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit status {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"
