"""Divides a list into blocks of consecutive utterances: all machines agree on them without communicating."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from u2moe.runtime.corpus.entry import Entry

_BLOCKS_PER_FOLDER = 1000
_NAME = re.compile(r"(?:.*/)?(\d{12})-(\d{12})\.jsonl")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive utterances of a list.

    Attributes:
        number: index among the blocks.
        start: position of its first utterance in the list.
        utterances: at least one.
    """

    number: int
    start: int
    utterances: Sequence[Entry]

    @property
    def stop(self) -> int:
        """Position after its last utterance."""
        return self.start + len(self.utterances)

    @property
    def file_name(self) -> str:
        """Path of its file in the folder of results; names the positions that it covers."""
        return f"{self.number // _BLOCKS_PER_FOLDER:06}/{self.start:012}-{self.stop:012}.jsonl"


def cut_into_blocks(utterances: Iterable[Entry], size: int) -> Iterator[Block]:
    """Blocks of `size` utterances, the last one shorter; holds one at a time."""
    remaining = iter(utterances)
    number = 0
    while content := tuple(islice(remaining, size)):
        yield Block(number=number, start=number * size, utterances=content)
        number += 1


def range_of(file_name: str) -> tuple[int, int] | None:
    """The positions (first, after the last) in the name of a file of results; None: it is another file."""
    found = _NAME.fullmatch(file_name)
    return (int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The blocks whose number modulo `count` is `index`.

    Raises:
        ValueError: `index` is not between 0 and `count` - 1.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard must be i/n with 0 <= i < n, got {self.index}/{self.count}")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """A shard from "i/n"; raises ValueError for anything else."""
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if found is None:
            raise ValueError(f"shard must be i/n, such as 0/4, got {text!r}")
        return cls(index=int(found[1]), count=int(found[2]))

    def __contains__(self, number: int) -> bool:
        return number % self.count == self.index
