"""The folder of a run: its description, a file for each finished block, and how many utterances there are in all.

    run.json                                    what the run is, written first
    blocks/000000/000000000000-000000000256.jsonl   results of the utterances at these positions of the list
    end.json                                    number of utterances, written by the first to read the whole list
    claims/                                     which block is being worked on, and by whom (local folders only)

A block is done when its file exists. Files appear as a whole, so a run may be killed at any moment.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from u2moe.runtime.corpus.blocks import Block, range_of
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
from u2moe.runtime.validation import first_difference

_INFORMATION = ("u2moe", "list_path")
"""Fields that may differ when a run is continued."""
_LONGEST_VALUE = 300


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """Everything that the results of a run depend on; a run is only continued with the same description.

    Attributes:
        u2moe: version that began it.
        list_path: the list that it was begun with.
        list_format: name of its format.
        list_digest: SHA-256 of what it lists.
        channel: the only channel that is used of every recording; None: as the list says.
        model: fingerprint of the bundle.
        providers: execution providers.
        kernels: "native" for those of u2moe-kernels, else "onnxruntime".
        options: decoding options, as JSON.
        hotwords: SHA-256 of the hotwords; None: those of the bundle.
        block_size: utterances in a block.
    """

    u2moe: str
    list_path: str
    list_format: str
    list_digest: str
    channel: int | None
    model: str
    providers: tuple[str, ...]
    kernels: str
    options: Mapping[str, Any]
    hotwords: str | None
    block_size: int

    def to_json(self) -> bytes:
        """The content of run.json."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes, name: str) -> RunDescription:
        """Parse the content of run.json; raises CorpusError, naming the file, if it does not describe a run."""
        try:
            record = json.loads(content)
            return cls(**record | {"providers": tuple(record["providers"])})
        except (ValueError, TypeError, KeyError) as error:
            raise CorpusError(f"{name}: does not describe a run of this version of u2moe: {error}") from error

    def check(self, other: RunDescription, folder: str) -> None:
        """Raise CorpusError if `other` describes another run than this one, of `folder`."""
        ours, theirs = (json.loads(run.to_json()) for run in (self, other))
        for name, value in ours.items():
            if name not in _INFORMATION and value != theirs[name]:
                where, before, after = first_difference(value, theirs[name], name.replace("_", " "))
                was, now = (json.dumps(each)[:_LONGEST_VALUE] for each in (before, after))
                raise CorpusError(f"{folder}: was begun with {where} {was}, now it is {now}: choose another folder")


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
        return dict(found for found, _ in self._files())

    def write_block(self, block: Block, content: bytes) -> None:
        """Write the results of a block, which finishes it."""
        write_whole(join(self._blocks, block.file_name), content)

    def is_finished(self, block: Block) -> bool:
        """Whether a block is finished now; another machine may have written it since `finished_blocks`."""
        return exists(join(self._blocks, block.file_name))

    def contents(self) -> Iterator[tuple[int, str, bytes]]:
        """First positions, files and contents of the finished blocks, in the order of the list."""
        for (start, _), file in self._files():
            content = read_bytes(file)
            if content is not None:
                yield start, file, content

    @property
    def num_utterances(self) -> int | None:
        """The number of utterances in the list; None: no process has read it to its end."""
        content = read_bytes(join(self.path, "end.json"))
        return None if content is None else int(json.loads(content)["num_utterances"])

    @num_utterances.setter
    def num_utterances(self, number: int) -> None:
        write_whole(join(self.path, "end.json"), json.dumps({"num_utterances": number}).encode() + b"\n")

    def num_missing(self) -> int | None:
        """Number of utterances without results; None: unknown, see `num_utterances`."""
        total = self.num_utterances
        return None if total is None else total - sum(stop - start for start, stop in self.finished_blocks().items())

    def _files(self) -> list[tuple[tuple[int, int], str]]:
        """Ranges and files of the finished blocks, in order."""
        ranged = ((range_of(name), join(self._blocks, name)) for name in list_files(self._blocks))
        return sorted((found, file) for found, file in ranged if found is not None)
