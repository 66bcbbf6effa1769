"""Stages of work, none of which is done again before something that it reads or makes has changed."""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from u2moe.benchmarks.results.files import read_json, write_json


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A piece of work.

    Attributes:
        name: its name, unlike those of others.
        work: does it.
        reads: files and folders that the work depends on.
        makes: files and folders that are there afterwards.
    """

    name: str
    work: Callable[[], None]
    reads: Sequence[Path]
    makes: Sequence[Path]


def digest(paths: Iterable[Path]) -> str:
    """The sha256 of the names and contents of files, and of all files in folders; of nothing for those that miss."""
    result = sha256()
    for path in paths:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            content = file.read_bytes() if file.exists() else b""
            result.update(f"{file.relative_to(path.parent).as_posix()} {len(content)}\n".encode() + content)
    return result.hexdigest()


def run(stage: Stage, records: Path, report: Callable[[str], None]) -> None:
    """Does a stage if it is not done, and remembers it in a file of the folder `records`.

    Raises:
        FileNotFoundError: the stage did not make what it should.
    """
    record = records / f"{stage.name}.json"
    reads = digest(stage.reads)
    if read_json(record) == {"reads": reads, "makes": digest(stage.makes)}:
        report(f"{stage.name}: is done")
        return
    report(f"{stage.name}: begins")
    begin = time.monotonic()
    stage.work()
    if missing := [str(path) for path in stage.makes if not path.exists()]:
        raise FileNotFoundError(f"{stage.name}: did not make {', '.join(missing)}")
    write_json(record, {"reads": reads, "makes": digest(stage.makes)})
    report(f"{stage.name}: took {time.monotonic() - begin:.0f} s")


def run_together(stages: Iterable[Stage], records: Path, report: Callable[[str], None]) -> None:
    """Does stages that do not depend on one another at the same time; the first error is raised when all have ended."""
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(run, stage, records, report) for stage in stages]
    for job in jobs:
        job.result()
