"""A run on a Ray cluster (extra `ray`), and the recogniser as a step of Ray Data pipelines.

Ray schedules, restarts what dies and limits memory; blocks, their files and what a second run does are those of
`runner`, so that a folder may be begun on a cluster and finished on one machine, or the other way round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from u2moe.runtime.corpus import parquet
from u2moe.runtime.corpus.blocks import cut_into_blocks
from u2moe.runtime.corpus.entry import AudioBytes, AudioFile, AudioSource, Entry
from u2moe.runtime.corpus.lists import read_utterances
from u2moe.runtime.corpus.model_choice import ModelChoice
from u2moe.runtime.corpus.recognition import BlockRecognizer, BlockWriter
from u2moe.runtime.corpus.rows import RowMaker, changed_options, options_as_json
from u2moe.runtime.corpus.run_folder import OutputFolder, RunDescription
from u2moe.runtime.corpus.runner import CorpusOptions, RunProgress, describe_run, finished_blocks
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.validation import checked_options

_GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "ROCMExecutionProvider")
_MOST_RETRIES = 3
"""How often a block is tried again whose actor died. After that it is left out, for a run on one machine to find the
utterance that kills its reader."""


def run_on_ray(
    list_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    model: ModelChoice | None = None,
    options: CorpusOptions | None = None,
    *,
    address: str | None = None,
    on_progress: Callable[[RunProgress], object] = lambda _: None,
) -> RunProgress:
    """Recognise what is missing of a corpus on a Ray cluster; otherwise like `run_corpus`.

    Each actor loads the model, and takes as many CPUs as it has threads and, with a provider for GPUs, one GPU. The
    list is read by one task without a CPU, so that actors may take all of them.

    Args:
        list_path: a list, folder or URL that all nodes can read.
        output: folder or URL that all nodes can write.
        model: the model, on all nodes in the same folder; None: the demo model.
        options: how the corpus is read, divided and written; `num_workers` None: as many actors as fit.
        address: of the cluster, as for `ray.init`; None: that of this program, or this machine alone.
        on_progress: called for each finished block.

    Raises:
        CorpusError: the list cannot be read, the folder belongs to another run, or there is no room for an actor.
    """
    model, options = model or ModelChoice(), checked_options("options", options, CorpusOptions())
    folder = OutputFolder(os.fspath(output))
    run = describe_run(os.fspath(list_path), model.load(), model, options)
    folder.begin(run)
    progress = RunProgress(total=folder.num_utterances)
    if not ray.is_initialized():
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    resources = _resources(model)
    num_actors = _num_actors(resources, options.num_workers)
    before = folder.finished_blocks()
    begin = time.monotonic()
    with _streaming():
        blocks = ray.data.read_datasource(
            _MissingBlocks(folder.path, run, options), num_cpus=0, override_num_blocks=1, concurrency=1
        )
        done = _recognized(blocks, (folder.path, run, model), num_actors, resources)
        for row in done.iter_rows():
            progress.num_done += row["num_utterances"]
            progress.num_failed += row["num_failed"]
            progress.num_warned += row["num_warned"]
            progress.seconds += row["seconds"]
            progress.num_recognized = progress.num_done
            progress.elapsed_s = time.monotonic() - begin
            on_progress(progress)
    progress.elapsed_s = time.monotonic() - begin
    progress.total = folder.num_utterances
    progress.num_before = sum(stop - start for start, stop in before.items())
    if not options.shard.count > 1 and (num_missing := folder.num_missing()) != 0:
        raise CorpusError(
            f"{folder.path}: {num_missing} utterances are missing, as their actors died again and again: run "
            "'u2moe corpus' without --ray, which finds those at which this happens"
        )
    return progress


def _recognized(
    blocks: ray.data.Dataset, arguments: tuple[Any, ...], num_actors: int, resources: Mapping[str, Any]
) -> ray.data.Dataset:
    """What becomes of the blocks in a pool of actors."""
    with warnings.catch_warnings():
        # Deprecated, but until Ray 2.64 there is nothing else that limits how often a killed actor's task is repeated.
        warnings.simplefilter("ignore", DeprecationWarning)
        return blocks.map_batches(
            _Actor,
            fn_constructor_args=arguments,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=num_actors, max_tasks_in_flight_per_actor=2),
            ray_remote_args_fn=lambda: {"max_task_retries": _MOST_RETRIES},
            **resources,
        )


@contextlib.contextmanager
def _streaming() -> Iterator[None]:
    """Options of Ray Data for a stream of small rows that each take long, and restore them afterwards."""
    context = ray.data.DataContext.get_current()
    chosen = {
        "target_max_block_size": 1,  # a row for each task: Ray would otherwise wait for 128 MB of them
        "target_min_block_size": 1,
        "enable_progress_bars": False,
        "max_errored_blocks": -1,
    }
    before = {name: getattr(context, name) for name in chosen}
    try:
        for name, value in chosen.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _resources(model: ModelChoice) -> dict[str, Any]:
    """What an actor takes."""
    is_for_gpus = any(provider in _GPU_PROVIDERS for provider in model.settings.providers)
    return {"num_cpus": model.num_threads, **({"num_gpus": 1} if is_for_gpus else {})}


def _num_actors(resources: Mapping[str, Any], wanted: int | None) -> int:
    """As many as are wanted or fit; more than fit would be waited for without end."""
    cluster = ray.cluster_resources()
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    room = min(int(cluster.get(names[name], 0) // amount) for name, amount in resources.items())
    if not 0 < (wanted or 1) <= room:
        found = {name: cluster.get(name, 0) for name in names.values()}
        raise CorpusError(f"{wanted or 1} actors with {dict(resources)} each do not fit into the cluster's {found}")
    return wanted or room


class _MissingBlocks(Datasource):  # type: ignore[misc]  # ray has no types
    """The blocks of a list that are to be done, each a row; read as a stream by one task."""

    def __init__(self, folder: str, run: RunDescription, options: CorpusOptions) -> None:
        super().__init__()
        self._folder = folder
        self._run = run
        self._options = options

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: the list is not read in advance."""
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """One task, since a list is read from its beginning."""
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        folder, run, options = self._folder, self._run, self._options
        return [ReadTask(lambda: _missing_blocks(folder, run, options), metadata)]


def _missing_blocks(path: str, run: RunDescription, options: CorpusOptions) -> Iterator[pa.Table]:
    folder = OutputFolder(path)
    finished = set(finished_blocks(folder, retry_failed=options.retry_failed))
    utterances = read_utterances(run.list_path, file_format=run.list_format, options=options.list_options)
    position = 0
    for block in cut_into_blocks(utterances, run.block_size):
        position = block.stop
        if block.number in options.shard and block.start not in finished:
            yield pa.table({"block": [pickle.dumps(block)]})
    if folder.num_utterances is None:
        folder.num_utterances = position


class _Actor:
    """Holds a model, and does one block after the other."""

    def __init__(self, folder: str, run: RunDescription, model: ModelChoice) -> None:
        self._writer = BlockWriter(OutputFolder(folder), run, model.load())

    def __call__(self, batch: pa.Table) -> pa.Table:
        """From a table with one block to one that says how it went."""
        block = pickle.loads(batch["block"][0].as_py())  # noqa: S301 - of our own task
        return pa.table({name: [value] for name, value in dataclasses.asdict(self._writer.write(block)).items()})


class Recognize:
    """A step of a Ray Data pipeline: `dataset.map_batches(Recognize, fn_constructor_args=(ModelChoice(),), ...)`.

    Takes batches of rows with a `path` (or URL), or with `bytes` and perhaps a `path`, as `ray.data.read_binary_files`
    gives them, and perhaps a `key`, which is otherwise the path. Returns a table of results with the columns of
    `parquet.SCHEMA`; damaged files are rows with an `error`.

    Leave CPUs free for reading and writing: a pipeline whose actors take all of them waits for ever.

    Args:
        model: the model; None: the demo model.
    """

    def __init__(self, model: ModelChoice | None = None) -> None:
        recognizer = (model or ModelChoice()).load()
        options = changed_options(options_as_json(recognizer.options))
        self._recognizer = BlockRecognizer(recognizer, RowMaker(model=recognizer.bundle.fingerprint, options=options))

    def __call__(self, batch: Mapping[str, np.ndarray[Any, Any]]) -> pa.Table:
        """A table of results, a row for each row of the batch, in order.

        Raises:
            CorpusError: the batch has neither paths nor bytes.
        """
        if "path" not in batch and "bytes" not in batch:
            raise CorpusError(f"a batch has the columns {', '.join(batch)}, expected path or bytes")
        size = len(next(iter(batch.values())))
        paths = [str(path) for path in batch["path"]] if "path" in batch else [f"row {i}" for i in range(size)]
        keys = [str(key) for key in batch["key"]] if "key" in batch else paths
        sources: list[AudioSource] = [AudioFile(path=path) for path in paths]
        if "bytes" in batch:
            sources = [
                AudioBytes(content=content, name=path) for content, path in zip(batch["bytes"], paths, strict=True)
            ]
        utterances = [Entry(key=key, source=source) for key, source in zip(keys, sources, strict=True)]
        return parquet.to_table(self._recognizer.recognize(utterances))
