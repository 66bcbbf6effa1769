"""The folder of a run: its description, a file for each finished block, and the number of entries.

    run.json                                    description of the run, written first
    blocks/000000/000000000000-000000000256.jsonl   results of the entries at these positions of the list
    end.json                                    number of entries, written by the first process to read the whole list
    claims/                                     who works on which block (local folders only)

A block is done when its file exists. Files are written atomically, so a run may be killed at any time.

Claims are not locks; they only avoid double work. If two processes recognise the same block, both write the same bytes
atomically. Where claims do not work (no hard links, delayed directory listings), only time is lost.
"""

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from u2moe.runtime.corpus.entry import Block, range_of
from u2moe.runtime.corpus.storage import is_url, join, list_files, read_bytes, write_first, write_whole
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.validation import first_difference
from u2moe.runtime.whole_file import probe, remove_stale_parts


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """All that affects the results of a run. When a run is continued, only `u2moe` and `list_path` may differ."""

    u2moe: str  # version at the start of the run
    list_path: str
    list_format: str
    list_digest: str  # SHA-256
    channel: int | None  # used for every recording; None: the one in the list, or the average of all channels
    model: str  # fingerprint of the bundle
    providers: tuple[str, ...]
    kernels: str  # "native" for u2moe-kernels, otherwise "onnxruntime"
    options: Mapping[str, Any]  # decoding options, as JSON
    hotwords: str | None  # SHA-256; None: those of the bundle
    block_size: int
    align: bool = False


class OutputFolder:
    """The folder of a run. Any number of processes and machines may use it at the same time.

    Args:
        path: a folder, or a URL that fsspec supports.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.claims = None if is_url(path) else join(path, "claims")
        self._blocks = join(path, "blocks")

    def begin(self, run: RunDescription) -> None:
        """Write the description of a run, or compare it with the existing one.

        Raise CorpusError if the folder belongs to another run, or contains other files, and OSError if writing fails.
        """
        file, content = join(self.path, "run.json"), json.dumps(dataclasses.asdict(run), indent=1)
        if read_bytes(file) is None and "run.json" not in (files := list_files(self.path)) and files:
            raise CorpusError(f"{self.path}: contains files but no run.json: choose an empty folder")
        if not write_first(file, content.encode() + b"\n"):
            found, wanted = json.loads(json.dumps(dataclasses.asdict(self.description()))), json.loads(content)
            for name, value in found.items():
                if name not in ("u2moe", "list_path") and value != wanted[name]:
                    where, before, after = first_difference(value, wanted[name], name.replace("_", " "))
                    was, now = (json.dumps(each)[:300] for each in (before, after))
                    changed = f"the run began with {where} {was}, but it is now {now}"
                    raise CorpusError(f"{self.path}: {changed}: change it back, or choose another folder")
        for place, _, _ in os.walk(self.path) if self.claims is not None else ():
            remove_stale_parts(Path(place))

    def description(self) -> RunDescription:
        """Return the description of the run in this folder. Raise CorpusError if it is missing or invalid."""
        name = join(self.path, "run.json")
        if (content := read_bytes(name)) is None:
            raise CorpusError(f"{self.path}: contains no run.json: start a run with 'u2moe corpus LIST {self.path}'")
        try:
            record = json.loads(content)
            return RunDescription(**record | {"providers": tuple(record["providers"])})
        except (ValueError, TypeError, KeyError) as error:
            raise CorpusError(f"{name}: does not describe a run of this version of u2moe: {error}") from error

    def finished_blocks(self) -> dict[int, int]:
        """Return, for each finished block in order, the position of its first entry and the position after its last."""
        return dict(found for found, _ in self._files())

    def write_block(self, block: Block, content: bytes) -> None:
        """Write the results of a block. The block is then finished."""
        write_whole(join(self._blocks, block.file_name), content)

    def is_finished(self, block: Block) -> bool:
        """Return whether a block is finished now. Another machine may have finished it after `finished_blocks` ran."""
        return read_bytes(join(self._blocks, block.file_name)) is not None

    def contents(self) -> Iterator[tuple[int, str, bytes]]:
        """For each finished block in list order, yield the first entry's position, the file, and its content."""
        for (start, _), file in self._files():
            if (content := read_bytes(file)) is not None:
                yield start, file, content

    @property
    def num_utterances(self) -> int | None:
        """Number of entries in the list. None: no process has read the whole list yet."""
        content = read_bytes(join(self.path, "end.json"))
        return None if content is None else int(json.loads(content)["num_utterances"])

    @num_utterances.setter
    def num_utterances(self, number: int) -> None:
        write_whole(join(self.path, "end.json"), json.dumps({"num_utterances": number}).encode() + b"\n")

    def num_missing(self) -> int | None:
        """Return the number of entries without results. None: unknown; see `num_utterances`."""
        total = self.num_utterances
        return None if total is None else total - sum(stop - start for start, stop in self.finished_blocks().items())

    def _files(self) -> list[tuple[tuple[int, int], str]]:
        """Return each finished block's range of positions and its file, in order."""
        ranged = ((range_of(name), join(self._blocks, name)) for name in list_files(self._blocks))
        return sorted((found, file) for found, file in ranged if found is not None)


LEASE_S = 600.0  # seconds after which a claim is void, unless it is renewed


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A process's claim on a block."""

    number: int
    host: str
    process: int
    started: int | None  # in clock ticks since boot, because process ids are reused; None: unknown
    age_s: float  # since the last renewal, by the clock of the file system

    @property
    def is_void(self) -> bool:
        """Whether the claim has expired, or its process ran on this machine and has ended."""
        if self.age_s > LEASE_S:
            return True
        if self.host != socket.gethostname() or os.name != "posix":
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return _started(self.process) != self.started


class Claims:
    """The claims of this process on blocks of a run, and access to the claims of other processes."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._own: set[int] = set()
        self._me = {"host": socket.gethostname(), "process": os.getpid(), "started": _started(os.getpid())}

    def take(self, number: int) -> bool:
        """Claim a block. Return False if another process holds a claim that is not void."""
        content = json.dumps(self._me).encode()
        with contextlib.suppress(OSError):  # if claims cannot be written, work without them
            if not write_first(str(self._path(number)), content):
                if (claim := self._read(number)) is not None and not claim.is_void:
                    return False
                write_whole(str(self._path(number)), content)
        self._own.add(number)
        return True

    def renew(self) -> None:
        """Renew all claims of this process. Call it several times within `LEASE_S`."""
        for number in self._own:
            with contextlib.suppress(OSError):
                os.utime(self._path(number))

    def release(self, number: int) -> None:
        """Release a block. It may be finished or unfinished."""
        self._own.discard(number)
        with contextlib.suppress(OSError):
            self._path(number).unlink()

    def close(self, finished: Container[int]) -> None:
        """Release the blocks of this process. Also release blocks in `finished` whose claims are void."""
        void = [claim.number for claim in self.held() if claim.number in finished and claim.is_void]
        for number in (*self._own, *void):
            self.release(number)

    def held(self) -> list[Claim]:
        """Return all claims on blocks of the run, including void claims."""
        numbers: list[int] = []
        with contextlib.suppress(OSError):
            numbers = sorted(int(file.name) for file in self._folder.iterdir() if file.name.isdigit())
        return [claim for claim in map(self._read, numbers) if claim is not None]

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:012}"

    def _read(self, number: int) -> Claim | None:
        """Return the claim on a block; None if the claim was released meanwhile or cannot be read."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            owner = json.loads(self._path(number).read_bytes())
            return Claim(number=number, age_s=probe(self._folder) - self._path(number).stat().st_mtime, **owner)
        return None


def _started(process: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return None
