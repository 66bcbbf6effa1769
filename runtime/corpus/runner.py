"""Recognition of a corpus. Worker processes recognise the blocks that have no results yet."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

from u2moe.runtime.corpus.entry import Block, Shard, cut_into_blocks
from u2moe.runtime.corpus.lists import FORMATS, ListOptions, digest, find_format, read_utterances
from u2moe.runtime.corpus.pool import WorkerPool, may_fork, num_cores
from u2moe.runtime.corpus.recognition import BlockDone, ModelChoice
from u2moe.runtime.corpus.results import is_faultless
from u2moe.runtime.corpus.rows import options_as_json
from u2moe.runtime.corpus.run_folder import LEASE_S, Claims, OutputFolder, RunDescription
from u2moe.runtime.declarations import Checked, option
from u2moe.runtime.recognizer import Recognizer


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(Checked):
    """How to read, divide and recognise a corpus.

    Attributes:
        list_options: how to interpret the entries of the list.
        block_size: number of entries per block. A killed process loses the results of its unfinished block.
        shard: which blocks to recognise.
        num_workers: number of processes. None: one per available core.
        retry_failed: repeat blocks with failed entries.
        align: align the transcripts of the list with the audio instead of recognising it.
    """

    list_options: ListOptions = option("record", ListOptions(), record=ListOptions)
    block_size: int = option("integer", 256, least=1, flag="--block-size", metavar="N")
    shard: Shard = option("record", Shard(), record=Shard)
    num_workers: int | None = option("integer", least=1, most=4096, flag="--workers", metavar="N")
    retry_failed: bool = option("flag", default=False, flag="--retry-failed")
    align: bool = option("flag", default=False, flag="--align")


@dataclass(kw_only=True)
class RunProgress:
    """The progress of a run.

    Attributes:
        total: number of entries in the list; None while it is unknown.
        num_before: number of entries that already had results.
        num_done: number of entries in the blocks that this call has finished.
        num_failed: number of entries among `num_done` that have an error.
        num_warned: number of entries among `num_done` that have warnings about their audio.
        num_elsewhere: number of entries in blocks of other processes, counted when no more blocks could be claimed.
        num_deaths: number of workers that died and were replaced.
        num_recognized: number of entries that this call has recognised, including those in unfinished blocks.
        seconds: seconds of audio in the recognised entries.
        elapsed_s: seconds since the workers started.
    """

    total: int | None = None
    num_before: int = 0
    num_done: int = 0
    num_failed: int = 0
    num_warned: int = 0
    num_elsewhere: int = 0
    num_deaths: int = 0
    num_recognized: int = 0
    seconds: float = 0.0
    elapsed_s: float = 0.0


def run_corpus(
    list_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    model: ModelChoice | None = None,
    options: CorpusOptions | None = None,
    *,
    on_progress: Callable[[RunProgress], object] = lambda _: None,
) -> RunProgress:
    """Recognise the entries of a corpus that have no results yet.

    Each entry gets exactly one row, even if a run is interrupted. If it cannot be recognised, the row has an `error`.

    Args:
        list_path: a folder or URL, or a list in any supported format.
        output: folder or URL for the results; see `OutputFolder`. Any number of machines may share it.
        model: the model; None: the demo model.
        options: how to read, divide and recognise the corpus.
        on_progress: called about once a second.

    Raises:
        CorpusError: the list cannot be read, or the folder belongs to another run.
        OSError: results cannot be written.
    """
    model, options = model or ModelChoice(), options or CorpusOptions()
    recognizer = model.load()
    with contextlib.closing(CorpusRun(list_path, output, recognizer, model, options)) as run:
        shared = recognizer if model.can_be_forked and may_fork() else None
        del recognizer
        num_workers = options.num_workers or max(num_cores() // model.num_threads, 1)
        with contextlib.closing(WorkerPool(run.folder.path, run.description, model, shared, num_workers)) as pool:
            run.work(pool, on_progress)
    return run.progress


class Workers(Protocol):
    """Workers that process blocks: a `WorkerPool`, or the actors on a cluster."""

    num_deaths: int = 0
    """Number of workers that died and were replaced."""

    def run(self, blocks: Iterator[Block]) -> Iterator[BlockDone | None]:
        """Process all blocks. Yield each finished block, and None about once a second."""

    def in_progress(self) -> tuple[int, float]:
        """Return the number of entries, and the seconds of audio, already recognised in unfinished blocks, if known."""
        return 0, 0.0


class CorpusRun:
    """One call, such as `run_corpus`, that begins or continues a run. `close` releases unfinished blocks."""

    def __init__(
        self,
        list_path: str | os.PathLike[str],
        output: str | os.PathLike[str],
        recognizer: Recognizer,
        model: ModelChoice,
        options: CorpusOptions,
    ) -> None:
        path = os.fspath(list_path)
        list_format = find_format(path)
        self.description = RunDescription(
            u2moe=version("u2moe"),
            list_path=path,
            list_format=list_format,
            list_digest=digest(path, list_format, options.list_options),
            channel=options.list_options.channel,
            model=recognizer.bundle.fingerprint,
            providers=tuple(recognizer.model.providers),
            kernels="native" if recognizer.model.kernels.native else "onnxruntime",
            options=options_as_json(recognizer.options),
            hotwords=model.hotwords_digest,
            block_size=options.block_size,
            align=options.align,
        )
        self.folder, self._options = OutputFolder(os.fspath(output)), options
        self.folder.begin(self.description)
        self.progress = RunProgress(total=self.folder.num_utterances)
        if self.progress.total is None:
            self.progress.total = FORMATS[list_format].count(path)
        self._claims = Claims(self.folder.claims) if self.folder.claims is not None else None
        self._finished = set(self.folder.finished_blocks())
        if options.retry_failed:
            self._finished = {start for start, _, content in self.folder.contents() if is_faultless(content)}
        self._own: set[int] = set()
        self._num_taken = 0

    def work(self, workers: Workers, on_progress: Callable[[RunProgress], object]) -> None:
        """Process blocks until all are finished or in progress in other processes."""
        progress, done_s = self.progress, 0.0
        begin = renewed = time.monotonic()
        while True:
            self._num_taken = progress.num_before = progress.num_elsewhere = 0
            for done in workers.run(self._missing()):
                if done is not None:
                    self._own.add(done.number * self.description.block_size)
                    progress.num_done += done.num_utterances
                    progress.num_failed += done.num_failed
                    progress.num_warned += done.num_warned
                    done_s += done.seconds
                    if self._claims is not None:
                        self._claims.release(done.number)
                num_utterances, seconds = workers.in_progress()
                progress.num_recognized, progress.seconds = progress.num_done + num_utterances, done_s + seconds
                progress.num_deaths, progress.elapsed_s = workers.num_deaths, time.monotonic() - begin
                if self._claims is not None and time.monotonic() - renewed > LEASE_S / 10:
                    self._claims.renew()
                    renewed = time.monotonic()
                on_progress(progress)
            if not (progress.num_elsewhere and self._num_taken):
                return

    def close(self) -> None:
        """Release unfinished blocks."""
        if self._claims is not None:
            self._claims.close({start // self.description.block_size for start in self._finished | self._own})

    def _missing(self) -> Iterator[Block]:
        """Read the list to its end; claim and yield its missing blocks in order."""
        position = 0
        run = self.description
        entries = read_utterances(run.list_path, file_format=run.list_format, options=self._options.list_options)
        for block in cut_into_blocks(entries, run.block_size):
            position = block.stop
            if block.start in self._own:
                continue
            if block.start in self._finished:
                self.progress.num_before += len(block.entries)
            elif block.number in self._options.shard and self._take(block):
                self._num_taken += 1
                yield block
        self.progress.total = position
        if self.folder.num_utterances is None:
            self.folder.num_utterances = position

    def _take(self, block: Block) -> bool:
        if self._claims is None:
            return True
        if not self._claims.take(block.number):
            self.progress.num_elsewhere += len(block.entries)
            return False
        if self._options.retry_failed or not self.folder.is_finished(block):
            return True
        self._claims.release(block.number)
        self._finished.add(block.start)
        self.progress.num_before += len(block.entries)
        return False
