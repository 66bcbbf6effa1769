"""A worker process: loads the model or inherits it, and works on one block at a time. `pool` is its parent."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from u2moe.runtime.corpus.block_recognizer import Caution
from u2moe.runtime.corpus.block_writer import BlockDone, BlockWriter
from u2moe.runtime.corpus.blocks import Block
from u2moe.runtime.corpus.model_choice import ModelChoice
from u2moe.runtime.corpus.output_folder import OutputFolder
from u2moe.runtime.corpus.run_description import RunDescription
from u2moe.runtime.recognizer import Recognizer

_ORPHAN_S = 2.0
"""How often a worker that waits looks whether its parent is still there."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Utterances and seconds of audio that were recognised since the last message."""

    num_utterances: int
    seconds: float

    def __add__(self, other: Progress) -> Progress:
        return Progress(num_utterances=self.num_utterances + other.num_utterances, seconds=self.seconds + other.seconds)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Indices of the utterances that are about to be read or decoded; sent only where a process has died before."""

    indices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """The worker cannot go on."""

    error: Exception


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """What a worker needs.

    Attributes:
        folder: the folder of the run.
        run: its description.
        model: the model.
        recognizer: it, already loaded, for a forked process; None: it is loaded.
        parent: process number of the parent.
    """

    folder: str
    run: RunDescription
    model: ModelChoice
    recognizer: Recognizer | None
    parent: int


Task = tuple[Block, Caution | None]


def work(setup: WorkerSetup, connection: Connection, cores: Sequence[int] | None) -> None:
    """Work on the blocks that come through the connection until it ends, or the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if cores is not None:
        os.sched_setaffinity(0, cores)
    try:
        _Worker(setup, connection).run()
    except (EOFError, ConnectionError):  # the parent is gone; what was written is whole
        return
    except Exception as error:  # noqa: BLE001 - the parent raises it
        error.add_note(traceback.format_exc())
        connection.send(Stopped(error=error))


class _Worker:
    def __init__(self, setup: WorkerSetup, connection: Connection) -> None:
        self._connection = connection
        self._parent = setup.parent
        self._is_careful = False
        self._writer = BlockWriter(
            OutputFolder(setup.folder),
            setup.run,
            setup.recognizer or setup.model.load(),
            on_progress=self._report,
            on_attempt=self._attempt,
        )

    def run(self) -> None:
        while True:
            while not self._connection.poll(_ORPHAN_S):
                self._end_with_parent()
            task: Task | None = self._connection.recv()
            if task is None:
                return
            block, caution = task
            self._is_careful = caution is not None
            done: BlockDone = self._writer.write(block, caution)
            self._connection.send(done)

    def _report(self, num_utterances: int, seconds: float) -> None:
        self._end_with_parent()
        self._connection.send(Progress(num_utterances=num_utterances, seconds=seconds))

    def _attempt(self, indices: Sequence[int]) -> None:
        if self._is_careful:
            self._connection.send(Attempt(indices=tuple(indices)))

    def _end_with_parent(self) -> None:
        """A forked sibling may hold the parent's end of the connection open, so that its end does not show."""
        if os.getppid() != self._parent:
            raise EOFError
