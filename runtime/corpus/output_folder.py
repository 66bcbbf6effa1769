"""The folder of a run: its description, a file for each finished block, and how many utterances there are in all.

    run.json                                    what the run is, written first
    blocks/000000/000000000000-000000000256.jsonl   results of the utterances at these positions of the list
    end.json                                    number of utterances, written by who first read the whole list
    claims/                                     which block is being worked on, and by whom (local folders only)

A block is done when its file exists. Files appear as a whole, so a run may be killed at any moment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from u2moe.runtime.corpus.blocks import Block, range_of
from u2moe.runtime.corpus.run_description import RunDescription
from u2moe.runtime.corpus.storage import (
    exists,
    is_url,
    join,
    list_files,
    read_bytes,
    remove_stale_parts,
    write_first,
    write_whole,
)
from u2moe.runtime.errors import CorpusError


class OutputFolder:
    """The folder of a run; any number of processes and machines may use it at once.

    Args:
        path: a folder, or a URL that fsspec knows.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.claims = None if is_url(path) else join(path, "claims")
        self._blocks = join(path, "blocks")

    def begin(self, run: RunDescription) -> None:
        """Write the description of a run, or compare it with the one that is there.

        Raises:
            CorpusError: the folder belongs to another run, or has files of something else.
            OSError: it cannot be written.
        """
        name = join(self.path, "run.json")
        if read_bytes(name) is None and "run.json" not in (files := list_files(self.path)) and files:
            raise CorpusError(f"{self.path}: holds files, but no run.json: choose an empty folder")
        if not write_first(name, run.to_json()):
            self.description().check(run, self.path)
        remove_stale_parts(self.path)

    def description(self) -> RunDescription:
        """The run of this folder; raises CorpusError if there is none."""
        name = join(self.path, "run.json")
        content = read_bytes(name)
        if content is None:
            raise CorpusError(f"{self.path}: holds no run.json: 'u2moe corpus LIST {self.path}' begins a run")
        return RunDescription.from_json(content, name)

    def finished_blocks(self) -> dict[int, int]:
        """First position of each finished block, and the position after its last, in order."""
        ranges = (range_of(name) for name in list_files(self._blocks))
        return dict(sorted(found for found in ranges if found is not None))

    def write_block(self, block: Block, content: bytes, suffix: str) -> None:
        """Write the results of a block, which is finished by that."""
        write_whole(join(self._blocks, block.file_name(suffix)), content)

    def is_finished(self, block: Block, suffix: str) -> bool:
        """Whether a block has its file now: another machine may have written it since `finished_blocks` looked."""
        return exists(join(self._blocks, block.file_name(suffix)))

    def contents(self) -> Iterator[tuple[int, bytes]]:
        """First positions and contents of the finished blocks, in the order of the list."""
        ranged = [(range_of(name), name) for name in list_files(self._blocks)]
        for (start, _), name in sorted((found, name) for found, name in ranged if found is not None):
            content = read_bytes(join(self._blocks, name))
            if content is not None:
                yield start, content

    def file_at(self, start: int) -> str:
        """The file of the finished block with this first position."""
        ranged = ((range_of(name), name) for name in list_files(self._blocks))
        return join(self._blocks, next(name for found, name in ranged if found is not None and found[0] == start))

    @property
    def num_utterances(self) -> int | None:
        """The number of utterances in the list, if a process has read it to its end."""
        content = read_bytes(join(self.path, "end.json"))
        return None if content is None else int(json.loads(content)["num_utterances"])

    @num_utterances.setter
    def num_utterances(self, number: int | None) -> None:
        write_whole(join(self.path, "end.json"), json.dumps({"num_utterances": number}).encode() + b"\n")

    def num_missing(self) -> int | None:
        """Utterances without results; None: unknown, as nobody has read the list to its end."""
        total = self.num_utterances
        done = sum(stop - start for start, stop in self.finished_blocks().items())
        return None if total is None else total - done
