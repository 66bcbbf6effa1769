"""Feature packs -> batches of similar length. Some utterances are joined, some change tempo, so that lengths vary."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from corpus import MEL_FLOOR, MEL_STEP, MELS, Pack
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MAX_FRAMES = 1600


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Padded log-mels [batch, frames, mels] and tokens [batch, tokens] with their lengths, and the texts."""

    mels: Tensor
    lengths: Tensor
    tokens: Tensor
    token_lengths: Tensor
    texts: list[str]


class Tokenizer:
    """WeNet's bpe tokenizer for normalized English text: sentencepiece pieces, ids from units.txt."""

    def __init__(self, folder: Path) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "bpe.model"))
        lines = (folder / "units.txt").read_text(encoding="utf-8").splitlines()
        self.units = [line.split()[0] for line in lines]
        self.ids = {unit: index for index, unit in enumerate(self.units)}

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(piece, self.ids["<unk>"]) for piece in self.model.encode(text, out_type=str)]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.units[token] for token in tokens).replace("\u2581", " ").strip()


@dataclass(frozen=True)
class Clip:
    """An utterance in memory-mapped form."""

    pack: int
    offset: int
    length: int
    tokens: tuple[int, ...]
    text: str


class Corpus:
    """The utterances of some packs."""

    def __init__(self, paths: list[Path], tokenizer: Tokenizer) -> None:
        packs = [Pack(path, MELS) for path in paths]
        self.rows: list[NDArray[np.uint8]] = [pack.map() for pack in packs]
        self.clips = [
            [
                Clip(number, entry.offset, entry.length, tuple(tokenizer.encode(entry.text)), entry.text)
                for entry in pack.utterances
                if entry.length <= MAX_FRAMES
            ]
            for number, pack in enumerate(packs)
        ]

    @property
    def hours(self) -> float:
        return sum(clip.length for clips in self.clips for clip in clips) / 360_000

    def frames(self, clip: Clip, tempo: float) -> Tensor:
        """Log-mels of a clip, played `tempo` times as fast."""
        rows = torch.from_numpy(self.rows[clip.pack][clip.offset : clip.offset + clip.length].astype(np.float32))
        if tempo != 1:
            position = torch.arange(0, clip.length - 1, tempo)
            left = position.long()
            rows = torch.lerp(rows[left], rows[left + 1], (position - left).unsqueeze(1))
        return rows * MEL_STEP + MEL_FLOOR

    def batch(self, groups: list[list[Clip]], rng: random.Random | None) -> Batch:
        """A batch of groups of clips; with `rng`, half of the groups change their tempo."""
        mels, tokens = [], []
        for group in groups:
            tempo = rng.uniform(0.85, 1.2) if rng and rng.random() < 0.5 else 1.0
            mels.append(torch.cat([self.frames(clip, tempo) for clip in group]))
            tokens.append(torch.tensor([token for clip in group for token in clip.tokens]))
        return Batch(
            mels=pad_sequence(mels, batch_first=True, padding_value=MEL_FLOOR),
            lengths=torch.tensor([len(part) for part in mels]),
            tokens=pad_sequence(tokens, batch_first=True, padding_value=-1),
            token_lengths=torch.tensor([len(part) for part in tokens]),
            texts=[" ".join(clip.text for clip in group) for group in groups],
        )

    def groups(self, rng: random.Random) -> list[list[Clip]]:
        """All clips once, in groups of the same voice: mostly alone, one time in eight joined with up to five others."""
        groups: list[list[Clip]] = []
        for clips in self.clips:
            room = 0
            for clip in rng.sample(clips, len(clips)):
                if clip.length + 1 <= room:
                    groups[-1].append(clip)
                else:
                    groups.append([clip])
                    room = rng.randrange(300, MAX_FRAMES) if rng.random() < 0.125 else 0
                room -= clip.length
        return groups

    def epoch(self, num_frames: int, rng: random.Random) -> Iterator[Batch]:
        """Training batches of about `num_frames` padded frames, in random order, each clip once."""
        batches = bucketed(self.groups(rng), num_frames, jitter=0.1, rng=rng)
        rng.shuffle(batches)
        for groups in batches:
            yield self.batch(groups, rng)

    def in_order(self, num_frames: int) -> Iterator[Batch]:
        """Batches of unchanged clips, short ones first."""
        groups = [[clip] for clips in self.clips for clip in clips]
        for part in bucketed(groups, num_frames, jitter=0.0, rng=random.Random(0)):
            yield self.batch(part, None)


def bucketed(groups: list[list[Clip]], num_frames: int, jitter: float, rng: random.Random) -> list[list[list[Clip]]]:
    """Groups of similar length together, at most `num_frames` padded frames in each batch."""
    size = {id(group): sum(clip.length for clip in group) for group in groups}
    batches: list[list[list[Clip]]] = []
    longest = 0
    for group in sorted(groups, key=lambda group: size[id(group)] * rng.uniform(1 - jitter, 1 + jitter)):
        longest = max(longest, size[id(group)])
        if not batches or longest * (len(batches[-1]) + 1) > num_frames:
            batches.append([])
            longest = size[id(group)]
        batches[-1].append(group)
    return batches
