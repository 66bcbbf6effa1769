"""A teacher's targets for the encoder frames of a pack of features; see `teacher.py`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from corpus import TARGET_ROW, TARGETS, Pack, Utterance
from manners import REVOICED, VARIANTS
from numpy.typing import NDArray
from prepare import FEATURES, plan
from torch import Tensor

BASIS = "basis.npz"
LIMIT = 4.0
"""Number of standard deviations that the largest target value stands for."""

Numbers = NDArray[np.float32]


class Basis:
    """Maps the teacher's output to principal components, and quantizes them to the type of `TARGETS`."""

    def __init__(self, mean: Numbers, matrix: Numbers, spread: Numbers) -> None:
        self.mean, self.matrix, self.spread = mean, matrix, spread

    @classmethod
    def of(cls, rows: Numbers) -> "Basis":
        """Return the basis for rows [count, dim]. All columns have equal weight."""
        mean, deviation = rows.mean(0), rows.std(0)
        centered = (rows - mean) / deviation
        variances, vectors = np.linalg.eigh(np.cov(centered.T))
        matrix = vectors[:, ::-1][:, : TARGETS.width] / deviation[:, None]
        spread = np.sqrt(variances[::-1][: TARGETS.width])
        return cls(mean, np.asarray(matrix, np.float32), np.asarray(spread, np.float32))

    def __call__(self, rows: Numbers) -> NDArray[np.int8]:
        """Return targets for rows: principal components, in steps of their spread times `LIMIT` / 127."""
        parts = (rows - self.mean) @ self.matrix / self.spread
        return np.clip(np.round(parts * (127 / LIMIT)), -127, 127).astype(np.int8)

    def save(self, path: Path) -> None:
        """Write the basis as `.npz`."""
        np.savez(path, mean=self.mean, matrix=self.matrix, spread=self.spread)

    @property
    def scale(self) -> Numbers:
        """Return factors [TARGETS.width] that turn targets into components whose variances sum to 1."""
        return np.asarray(self.spread * (LIMIT / 127) / np.sqrt((self.spread**2).sum()), np.float32)

    @classmethod
    def load(cls, path: Path) -> "Basis":
        """Read a file written by `save`."""
        with np.load(path) as parts:
            return cls(parts["mean"], parts["matrix"], parts["spread"])


class Lessons:
    """Targets of the utterances of one pack. Utterances that the teacher has not processed yet have no targets.

    Variants of a recording share the recording's targets, since they contain the same words, only slower or faster.
    """

    def __init__(self, folder: Path, name: str, utterances: Sequence[Utterance]) -> None:
        source = name.removesuffix(REVOICED)
        self.copies = plan(name)[0] if name == source else VARIANTS.get(source, 1)
        pack = Pack(folder / source, TARGETS)
        self.entries = pack.utterances
        self.rows = pack.map()
        self.scale = torch.from_numpy(Basis.load(folder / BASIS).scale) if self.entries else torch.ones(TARGETS.width)
        for number, utterance in enumerate(utterances[: self.copies * len(self.entries)]):
            if utterance.text != self.entries[number // self.copies].text:
                raise ValueError(f"utterance {number} of {name} is not what the teacher heard: {utterance.text!r}")

    def __call__(self, number: int, places: Tensor, length: int) -> Tensor:
        """Return targets [count, TARGETS.width] at positions in an utterance of `length` mel frames.

        The targets are nan if the utterance has none.
        """
        if number // self.copies >= len(self.entries):
            return torch.full((len(places), TARGETS.width), torch.nan)
        entry = self.entries[number // self.copies]
        rows = torch.from_numpy(self.rows[entry.offset : entry.offset + entry.length].astype(np.float32)) * self.scale
        samples = (entry.length - 0.5) * TARGET_ROW
        speed = samples / (length * FEATURES.shift_len + FEATURES.frame_len - FEATURES.shift_len)
        centers = speed * (places * FEATURES.shift_len + FEATURES.frame_len / 2)
        # a row is the mean of two frames of the teacher, at the beginning and the middle of the row
        position = ((centers / TARGET_ROW) - 0.25).clamp(0, len(rows) - 1)
        left = position.long()
        return torch.lerp(rows[left], rows[(left + 1).clamp(max=len(rows) - 1)], (position - left).unsqueeze(1))
