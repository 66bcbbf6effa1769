"""Packs of utterances. A pack is a file of rows (samples or mel frames), and a TSV with places and texts."""

from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

SAMPLE_RATE = 16000
NUM_MELS = 80
MEL_STEP, MEL_FLOOR = 0.16, -16.0
FRAGMENTS = "-fragments"
"""Suffix for the name of a pack that has words and phrases cut from another pack."""
TARGET_ROW = SAMPLE_RATE // 25
"""Number of samples per row of a teacher's targets. A row is two frames of the teacher."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Kind of the rows of a pack: file suffix, type of the numbers, and numbers per row."""

    suffix: str
    dtype: str
    width: int


SPEECH = Kind(suffix=".pcm", dtype="<i2", width=1)
MELS = Kind(suffix=".mel", dtype="u1", width=NUM_MELS)
TARGETS = Kind(suffix=".teach", dtype="i1", width=128)


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """The place of an utterance in its pack (in rows), its speaker, and its normalized text."""

    offset: int
    length: int
    voice: str
    text: str


class Pack:
    """A pack, to which utterances can be appended.

    It can be read while another process writes it. An incomplete last utterance is ignored.
    """

    def __init__(self, path: Path, kind: Kind) -> None:
        self.kind = kind
        self.rows_path = path.with_suffix(kind.suffix)
        self.table_path = path.with_suffix(".tsv")
        self.utterances: list[Utterance] = []
        self._table_size = 0
        if self.table_path.exists():
            whole, end, _ = self.table_path.read_text(encoding="utf-8").rpartition("\n")
            self._table_size = len((whole + end).encode())
            for line in whole.splitlines():
                offset, length, voice, text = line.split("\t")
                self.utterances.append(Utterance(offset=int(offset), length=int(length), voice=voice, text=text))

    def __enter__(self) -> Self:
        self.rows_path.parent.mkdir(parents=True, exist_ok=True)
        self._rows = self.rows_path.open("ab")
        self._rows.truncate(self.num_rows * np.dtype(self.kind.dtype).itemsize * self.kind.width)
        self._table = self.table_path.open("a", encoding="utf-8")
        self._table.truncate(self._table_size)
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()
        self._table.close()

    @property
    def num_rows(self) -> int:
        """Number of rows of all complete utterances."""
        return self.utterances[-1].offset + self.utterances[-1].length if self.utterances else 0

    def append(self, rows: NDArray[Any], voice: str, text: str) -> None:
        """Append one utterance. `rows` must have the number type of the pack."""
        entry = Utterance(offset=self.num_rows, length=len(rows), voice=voice, text=text)
        self._rows.write(rows.astype(self.kind.dtype).tobytes())
        self._rows.flush()
        self._table.write(f"{entry.offset}\t{entry.length}\t{voice}\t{text}\n")
        self._table.flush()
        self.utterances.append(entry)

    def map(self) -> NDArray[Any]:
        """Return all rows, memory-mapped: [rows] or [rows, width]."""
        if not self.utterances:  # an empty file cannot be mapped
            return np.empty((0,) if self.kind.width == 1 else (0, self.kind.width), self.kind.dtype)
        rows = np.memmap(self.rows_path, self.kind.dtype, "r")
        return rows if self.kind.width == 1 else rows[: self.num_rows * self.kind.width].reshape(-1, self.kind.width)


def to_pcm(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    """Convert samples in [-1, 1] to int16."""
    return np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)


def to_float(samples: NDArray[np.int16]) -> NDArray[np.float32]:
    """Convert int16 samples to [-1, 1]."""
    return np.asarray(samples, np.float32) / np.float32(32768)


def to_bytes(mels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return log-mel energies as 8-bit integers, in steps of `MEL_STEP`."""
    return np.clip(np.round((mels - MEL_FLOOR) / MEL_STEP), 0, 255).astype(np.uint8)


def resample(samples: NDArray[np.float32], rate: int, target: int = SAMPLE_RATE) -> NDArray[np.float32]:
    """Resample from an integer rate in Hz to another, with a band limit."""
    if rate == target:
        return samples
    step = gcd(rate, target)
    return np.asarray(resample_poly(samples, target // step, rate // step), np.float32)
