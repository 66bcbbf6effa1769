"""Recognises lists on a Ray cluster (extra `ray`), and offers the recogniser as a step of Ray Data pipelines.

The calling program reads the list and assigns blocks to actors. Ray starts the actors and restarts them after a crash.
The files are those of a run on one machine. A run may begin on a cluster and finish on one machine, or vice versa.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from u2moe.runtime.corpus import parquet
from u2moe.runtime.corpus.entry import AudioBytes, AudioFile, AudioSource, Block, Entry
from u2moe.runtime.corpus.recognition import BlockDone, BlockRecognizer, ModelChoice, write_block
from u2moe.runtime.corpus.rows import RowMaker, changed_options, options_as_json
from u2moe.runtime.corpus.run_folder import OutputFolder, RunDescription
from u2moe.runtime.corpus.runner import CorpusOptions, CorpusRun, RunProgress, Workers
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.validation import checked_options

_GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "ROCMExecutionProvider")
_MOST_RETRIES = 3
"""Maximum number of retries of a block after its actor died. A run on one machine can find the entry that causes it."""


def run_on_ray(
    list_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    model: ModelChoice | None = None,
    options: CorpusOptions | None = None,
    *,
    address: str | None = None,
    on_progress: Callable[[RunProgress], object] = lambda _: None,
) -> RunProgress:
    """Recognise a corpus as `run_corpus` does, but on a Ray cluster. For other arguments and errors, see there.

    Each actor loads the model. An actor takes one CPU per thread and, with a GPU provider, one GPU. All nodes must be
    able to read the model in the same folder, and the audio, and to write to `output`. With `num_workers=None`, as many
    actors run as fit. `address` is for `ray.init`; None: the cluster that Ray finds, or else only this machine.

    Raises:
        CorpusError: also if the cluster is too small, or entries are left out because actors died repeatedly.
    """
    model, options = model or ModelChoice(), checked_options("options", options, CorpusOptions())
    with contextlib.closing(CorpusRun(list_path, output, model.load(), model, options)) as run:
        if not ray.is_initialized():
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        actors = _Actors(run, model, options.num_workers)
        run.work(actors, on_progress)
    if actors.num_left_out:
        raise CorpusError(
            f"{run.folder.path}: {actors.num_left_out} utterances are missing because actors died repeatedly: "
            "run 'u2moe corpus' without --ray to find the utterances that cause this"
        )
    return run.progress


class _Actors(Workers):
    """`wanted` actors or, if that is None, as many as fit into the cluster. Ray does not report restarts."""

    def __init__(self, run: CorpusRun, model: ModelChoice, wanted: int | None) -> None:
        self.num_left_out = 0  # entries in blocks whose actors died repeatedly
        is_for_gpus = any(provider in _GPU_PROVIDERS for provider in model.settings.providers)
        resources: dict[str, Any] = {"num_cpus": model.num_threads, **({"num_gpus": 1} if is_for_gpus else {})}
        cluster, names = ray.cluster_resources(), {"num_cpus": "CPU", "num_gpus": "GPU"}
        room = min(int(cluster.get(names[name], 0) // amount) for name, amount in resources.items())
        if not 0 < (wanted or 1) <= room:  # Ray would wait forever
            size = {name: cluster.get(name, 0) for name in names.values()}
            raise CorpusError(f"the cluster ({size}) has room for {room} of {wanted or 1} actors with {resources} each")
        remote: Any = ray.remote(max_restarts=-1, max_task_retries=_MOST_RETRIES, **resources)(_Actor)
        self._actors = [remote.remote(run.folder.path, run.description, model) for _ in range(wanted or room)]

    def run(self, blocks: Iterator[Block]) -> Iterator[BlockDone | None]:
        """Process all blocks; see `Workers.run`. Exceptions raised in actors are re-raised here."""
        idle, tasks = list(self._actors), {}
        while True:
            while idle and (block := next(blocks, None)) is not None:
                actor = idle.pop()
                tasks[actor.write.remote(block)] = (actor, block)
            if not tasks:
                return
            ready, _ = ray.wait(list(tasks), timeout=1.0)
            done = None
            for task in ready:
                actor, block = tasks.pop(task)
                idle.append(actor)
                try:
                    done = ray.get(task)
                except ray.exceptions.RayActorError:
                    self.num_left_out += len(block.entries)
            yield done


class _Actor:
    """Actor that loads a model and recognises one block at a time."""

    def __init__(self, folder: str, run: RunDescription, model: ModelChoice) -> None:
        self._folder = OutputFolder(folder)
        self._recognizer = BlockRecognizer(model.load(), RowMaker.of_run(run), align=run.align)

    def write(self, block: Block) -> BlockDone:
        """Recognise a block and write its file."""
        return write_block(self._folder, block, self._recognizer.recognize(block.entries))


class Recognize:
    """A step of a Ray Data pipeline: `dataset.map_batches(Recognize, fn_constructor_args=(ModelChoice(),), ...)`.

    A batch needs a column `path` (paths or URLs) or a column `bytes`, such as that of `ray.data.read_binary_files`. It
    may have both. A column `key` is optional; by default, the path is the key. The result has the columns of
    `parquet.SCHEMA`. Damaged files have an `error` in their rows.

    Leave CPUs free for reading and writing. If actors take all CPUs, the pipeline waits forever.

    Args:
        model: the model; None: the demo model.
    """

    def __init__(self, model: ModelChoice | None = None) -> None:
        recognizer = (model or ModelChoice()).load()
        options = changed_options(options_as_json(recognizer.options))
        self._recognizer = BlockRecognizer(recognizer, RowMaker(model=recognizer.bundle.fingerprint, options=options))

    def __call__(self, batch: Mapping[str, np.ndarray[Any, Any]]) -> pa.Table:
        """Return a table of results. It has one row for each row of the batch, in the same order.

        Raises:
            CorpusError: the batch has neither a column `path` nor a column `bytes`.
        """
        if "path" not in batch and "bytes" not in batch:
            raise CorpusError(f"a batch must have a column named path or bytes, got {', '.join(batch)}")
        size = len(next(iter(batch.values())))
        paths = [str(path) for path in batch["path"]] if "path" in batch else [f"row {i}" for i in range(size)]
        keys = [str(key) for key in batch["key"]] if "key" in batch else paths
        sources: list[AudioSource] = [AudioFile(path=path) for path in paths]
        if "bytes" in batch:
            sources = [AudioBytes(content=each, name=path) for each, path in zip(batch["bytes"], paths, strict=True)]
        entries = [Entry(key=key, source=source) for key, source in zip(keys, sources, strict=True)]
        return parquet.to_table(self._recognizer.recognize(entries))
