"""Feature packs -> batches of similar length. Some utterances are joined, some change tempo, so that lengths vary."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from corpus import MEL_FLOOR, MEL_STEP, MELS, Pack
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

MAX_FRAMES = 1600
FRAME_GRID = 96
"""Batches are padded to multiples of this: 16 frames of the encoder."""
TOKEN_GRID = 8


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
        """Token ids of a normalized text."""
        return [self.ids.get(piece, self.ids["<unk>"]) for piece in self.model.encode(text, out_type=str)]

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids."""
        return "".join(self.units[token] for token in tokens).replace("\u2581", " ").strip()


@dataclass(frozen=True)
class Clip:
    """An utterance in memory-mapped form."""

    pack: int
    offset: int
    length: int
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Item:
    """Clips that are heard one after the other, at one tempo."""

    clips: list[Clip]
    tempo: float


class Corpus:
    """The utterances of some packs whose words all occur `min_word_count` times there."""

    def __init__(self, paths: list[Path], tokenizer: Tokenizer, min_word_count: int = 1) -> None:
        packs = [Pack(path, MELS) for path in paths]
        counts = Counter(word for pack in packs for entry in pack.utterances for word in entry.text.split())
        self.rows: list[NDArray[np.uint8]] = [pack.map() for pack in packs]
        self.clips = [
            [
                Clip(number, entry.offset, entry.length, tuple(tokenizer.encode(entry.text)), entry.text)
                for entry in pack.utterances
                if entry.length <= MAX_FRAMES and all(counts[word] >= min_word_count for word in entry.text.split())
            ]
            for number, pack in enumerate(packs)
        ]

    @property
    def hours(self) -> float:
        """Duration of all clips."""
        return sum(clip.length for clips in self.clips for clip in clips) / 360_000

    def frames(self, clip: Clip, tempo: float) -> Tensor:
        """Log-mels of a clip, played `tempo` times as fast."""
        rows = torch.from_numpy(self.rows[clip.pack][clip.offset : clip.offset + clip.length].astype(np.float32))
        if tempo != 1:
            position = torch.arange(num_frames(clip, tempo)) * tempo
            left = position.long()
            rows = torch.lerp(rows[left], rows[left + 1], (position - left).unsqueeze(1))
        return rows * MEL_STEP + MEL_FLOOR

    def batch(self, items: list[Item]) -> Batch:
        """A batch of items, padded to a multiple of `FRAME_GRID` frames and `TOKEN_GRID` tokens."""
        mels = [torch.cat([self.frames(clip, item.tempo) for clip in item.clips]) for item in items]
        tokens = [torch.tensor([token for clip in item.clips for token in clip.tokens]) for item in items]
        padded_mels = pad_sequence(mels, batch_first=True, padding_value=MEL_FLOOR)
        padded_tokens = pad_sequence(tokens, batch_first=True, padding_value=-1)
        return Batch(
            mels=pad(padded_mels, (0, 0, 0, -padded_mels.shape[1] % FRAME_GRID), value=MEL_FLOOR),
            lengths=torch.tensor([len(part) for part in mels]),
            tokens=pad(padded_tokens, (0, -padded_tokens.shape[1] % TOKEN_GRID), value=-1),
            token_lengths=torch.tensor([len(part) for part in tokens]),
            texts=[" ".join(clip.text for clip in item.clips) for item in items],
        )

    def items(self, rng: random.Random, longest: int) -> list[Item]:
        """All clips up to a length, half of them at another tempo; one time in eight some of one voice are joined."""
        items: list[Item] = []
        for clips in self.clips:
            room = 0
            for clip in rng.sample(clips, len(clips)):
                if clip.length > longest:
                    continue
                if clip.length < room:
                    items[-1].clips.append(clip)
                else:
                    items.append(Item([clip], rng.uniform(0.85, 1.2) if rng.random() < 0.5 else 1.0))
                    joins = longest == MAX_FRAMES and rng.random() < 0.125
                    room = rng.randrange(300, MAX_FRAMES) if joins else 0
                room -= clip.length
        return items

    def epoch(self, batch_frames: int, rng: random.Random, longest: int = MAX_FRAMES) -> Iterator[Batch]:
        """Training batches of at most `batch_frames` padded frames, in random order, each clip once."""
        batches = bucketed(self.items(rng, longest), batch_frames)
        rng.shuffle(batches)
        for items in batches:
            yield self.batch(items)

    def in_order(self, batch_frames: int) -> Iterator[Batch]:
        """Batches of unchanged clips, short ones first."""
        for items in bucketed([Item([clip], 1.0) for clips in self.clips for clip in clips], batch_frames):
            yield self.batch(items)


def num_frames(clip: Clip, tempo: float) -> int:
    """Frames of a clip that is played `tempo` times as fast."""
    return clip.length if tempo == 1 else int((clip.length - 2) / tempo)


def bucketed(items: list[Item], batch_frames: int) -> list[list[Item]]:
    """Batches of items whose padded lengths are alike; what does not fill a batch joins the next longer ones.

    Few different shapes matter more than little padding: oneDNN compiles a kernel for each shape that it meets.
    """
    buckets: dict[int, list[Item]] = {}
    for item in items:
        length = sum(num_frames(clip, item.tempo) for clip in item.clips)
        buckets.setdefault(length + -length % FRAME_GRID, []).append(item)
    batches: list[list[Item]] = []
    rest: list[Item] = []
    for length, members in sorted(buckets.items()):
        waiting = rest + members
        size = max(batch_frames // length, 1)
        full = len(waiting) // size * size
        batches += [waiting[start : start + size] for start in range(0, full, size)]
        rest = waiting[full:]
    return [*batches, rest] if rest else batches
