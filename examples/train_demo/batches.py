"""Makes batches of items of similar length from feature packs. Some utterances are joined or change their tempo."""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import sentencepiece
import torch
from checkpoints import PIECES, content
from corpus import MEL_FLOOR, MEL_STEP, MELS, TARGETS, Pack
from lessons import Lessons
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

MAX_FRAMES = 1600
FRAME_GRID = 96
"""Batches are padded to multiples of this number of mel frames, which is 16 encoder frames."""
TOKEN_GRID = 8
SUBSAMPLING, CENTER = 6, 5
"""Number of mel frames per encoder frame, and index of the middle one of the mel frames in the first encoder frame."""
JOINED = 0.125
"""Share of the items that may join several utterances of a pack."""
ABRUPT, DRAWN_OUT = 0.2, 0.2
"""Shares of items that are cut within `CLOSE` frames of the speech, or get up to `SILENCE` extra frames, at one end. No
item becomes shorter than `SHORTEST` frames."""
CLOSE, SILENCE, SHORTEST = 3, 50, 40
QUIET = 0.25
"""Level below which a frame is silent, as a share of a clip's range of levels."""
TENSORS = ("mels", "lengths", "tokens", "token_lengths", "targets")
NO_PORTIONS: Mapping[str, float] = {}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Padded log-mels [batch, frames, mels] and tokens [batch, tokens] with their lengths, and the texts.

    `targets` [batch, frames / SUBSAMPLING, TARGETS.width] are a teacher's targets for encoder frames. Missing targets
    are nan.
    """

    mels: Tensor
    lengths: Tensor
    tokens: Tensor
    token_lengths: Tensor
    texts: list[str]
    targets: Tensor | None = None

    def _changed(self, change: Callable[[Tensor], Tensor], texts: list[str]) -> Self:
        tensors = {name: change(getattr(self, name)) for name in TENSORS if getattr(self, name) is not None}
        return replace(self, **tensors, texts=texts)

    def to(self, device: str) -> Self:
        """Return the batch with its tensors on a device."""
        return self._changed(lambda tensor: tensor.to(device), self.texts)

    def twice(self) -> Self:
        """Return the batch with all utterances twice."""
        return self._changed(lambda tensor: torch.cat([tensor] * 2), 2 * self.texts)


class Tokenizer:
    """WeNet's BPE tokenizer for normalized English text, with pieces from sentencepiece and ids from units.txt."""

    def __init__(self, folder: Path) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_proto=content(folder / PIECES))
        lines = (folder / "units.txt").read_text(encoding="utf-8").splitlines()
        self.units = [line.split()[0] for line in lines]
        self.ids = {unit: index for index, unit in enumerate(self.units)}
        self.known: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a normalized text. They are cached, since every epoch needs them again."""
        if text not in self.known:
            pieces = self.model.encode(text, out_type=str)
            self.known[text] = tuple(self.ids.get(piece, self.ids["<unk>"]) for piece in pieces)
        return self.known[text]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids."""
        return "".join(self.units[token] for token in tokens).replace("\u2581", " ").strip()


@dataclass(frozen=True)
class Clip:
    """An utterance whose features are memory-mapped."""

    pack: int
    number: int
    offset: int
    length: int
    voice: str
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Item:
    """One or more clips, joined and played at one tempo."""

    clips: list[Clip]
    tempo: float
    edges: tuple[int, int] = (0, 0)
    """Numbers of frames of silence added before and after the clips. Negative numbers remove frames."""

    @property
    def num_frames(self) -> int:
        """Number of frames of the item."""
        return sum(num_frames(clip, self.tempo) for clip in self.clips) + sum(self.edges)

    def places(self) -> list[Tensor]:
        """Return the positions in each clip from which frames are read."""
        found = [played(clip, self.tempo) for clip in self.clips]
        before, behind = self.edges
        found[0] = torch.cat([found[0][:1].expand(max(before, 0)), found[0][max(-before, 0) :]])
        last = len(found[-1])
        found[-1] = torch.cat([found[-1][: last + min(behind, 0)], found[-1][-1:].expand(max(behind, 0))])
        return found


class Corpus:
    """The utterances of those packs that `wanted` accepts.

    Packs may grow while a network is trained on them. The attribute `sizes` is the number of utterances that were read
    from each pack. Passing it as an argument restores the corpus as it was. `targets` is the folder of a teacher's
    targets. Without it, batches have no targets.
    """

    def __init__(
        self,
        paths: list[Path],
        tokenizer: Tokenizer,
        wanted: Callable[[str], bool] = lambda _: True,
        sizes: dict[str, int] | None = None,
        targets: Path | None = None,
    ) -> None:
        packs = [Pack(path, MELS) for path in paths]
        self.sizes = {path.name: len(pack.utterances) for path, pack in zip(paths, packs, strict=True)}
        self.sizes = self.sizes if sizes is None else sizes
        self.names = [path.name for path in paths]
        self.rows: list[NDArray[np.uint8]] = [pack.map() for pack in packs]
        self.clips = [
            [
                Clip(index, number, entry.offset, entry.length, entry.voice, tokenizer.encode(entry.text), entry.text)
                for number, entry in enumerate(pack.utterances[: self.sizes[path.name]])
                if entry.length <= MAX_FRAMES and wanted(entry.text)
            ]
            for index, (path, pack) in enumerate(zip(paths, packs, strict=True))
        ]
        self.lessons: list[Lessons] | None = None
        if targets:
            self.lessons = [
                Lessons(targets, path.name, pack.utterances) for path, pack in zip(paths, packs, strict=True)
            ]

    @property
    def hours(self) -> float:
        """Duration of all clips in hours."""
        return sum(clip.length for clips in self.clips for clip in clips) / 360_000

    def frames(self, clip: Clip, places: Tensor) -> Tensor:
        """Return the log-mels of a clip at fractional positions."""
        rows = torch.from_numpy(self.rows[clip.pack][clip.offset : clip.offset + clip.length].astype(np.float32))
        left = places.long()
        right = (left + 1).clamp(max=clip.length - 1)
        return torch.lerp(rows[left], rows[right], (places - left).unsqueeze(1)) * MEL_STEP + MEL_FLOOR

    def targets(self, lessons: list[Lessons], item: Item, places: list[Tensor]) -> Tensor:
        """Return a teacher's targets [frames / SUBSAMPLING, TARGETS.width] for an item read at `places`."""
        found, start = [], 0
        for clip, place in zip(item.clips, places, strict=True):
            centers = place[(CENTER - start) % SUBSAMPLING :: SUBSAMPLING]
            found.append(lessons[clip.pack](clip.number, centers, clip.length))
            start += len(place)
        return torch.cat(found)

    def batch(self, items: list[Item]) -> Batch:
        """Return a batch of items, padded to multiples of `FRAME_GRID` frames and `TOKEN_GRID` tokens."""
        places = [item.places() for item in items]
        mels = [
            torch.cat([self.frames(clip, place) for clip, place in zip(item.clips, own, strict=True)])
            for item, own in zip(items, places, strict=True)
        ]
        tokens = [
            torch.tensor([token for clip in item.clips for token in clip.tokens], dtype=torch.long) for item in items
        ]
        padded_mels = pad_sequence(mels, batch_first=True, padding_value=MEL_FLOOR)
        padded_tokens = pad_sequence(tokens, batch_first=True, padding_value=-1)
        padded_mels = pad(padded_mels, (0, 0, 0, -padded_mels.shape[1] % FRAME_GRID), value=MEL_FLOOR)
        targets = None
        if self.lessons is not None:
            each = [self.targets(self.lessons, item, own) for item, own in zip(items, places, strict=True)]
            targets = torch.full((len(items), padded_mels.shape[1] // SUBSAMPLING, TARGETS.width), torch.nan)
            for row, found in zip(targets, each, strict=True):
                row[: len(found)] = found
        return Batch(
            mels=padded_mels,
            lengths=torch.tensor([len(part) for part in mels]),
            tokens=pad(padded_tokens, (0, -padded_tokens.shape[1] % TOKEN_GRID), value=-1),
            token_lengths=torch.tensor([len(part) for part in tokens]),
            texts=[" ".join(clip.text for clip in item.clips) for item in items],
            targets=targets,
        )

    def items(self, rng: random.Random, longest: int, portions: Mapping[str, float]) -> list[Item]:
        """Return items of clips up to `longest` frames. Half change tempo, and one in eight joins clips of one voice.

        `portions` is the share of each pack to use. With 1, every clip occurs once. With 0.5, every second clip does.
        With 2, every clip occurs twice.
        """
        items: list[Item] = []
        for name, clips in zip(self.names, self.clips, strict=True):
            room = 0
            times = portions.get(name, 1.0)
            chosen = [clip for _ in range(int(times)) for clip in rng.sample(clips, len(clips))]
            for clip in chosen + rng.sample(clips, round(times % 1 * len(clips))):
                if clip.length > longest:
                    continue
                if clip.length < room and clip.voice == items[-1].clips[0].voice:
                    items[-1].clips.append(clip)
                else:
                    tempo = rng.uniform(0.85, 1.2) if rng.random() < 0.5 else 1.0
                    items.append(Item([clip], tempo))
                    joins = longest == MAX_FRAMES and rng.random() < JOINED
                    room = rng.randrange(300, MAX_FRAMES) if joins else 0
                room -= clip.length
        return [replace(item, edges=self.edges(item, rng)) for item in items]

    def edges(self, item: Item, rng: random.Random) -> tuple[int, int]:
        """Draw how many frames of silence an item gains before and after; negative numbers remove frames.

        Recordings may begin with a word, or long before it.
        """
        first, last = item.clips[0], item.clips[-1]
        if not first.tokens:
            return 0, 0
        before = self._edge(lambda: int(self.silence(first)[0] / item.tempo), rng)
        behind = self._edge(lambda: int(self.silence(last)[1] / item.tempo), rng)
        return (before, behind) if item.num_frames + before + behind >= SHORTEST else (0, 0)

    def _edge(self, silence: Callable[[], int], rng: random.Random) -> int:
        kind, some = rng.random(), rng.random()
        if kind < ABRUPT:
            return -max(silence() - int(some * (CLOSE + 1)), 0)
        return int(some * SILENCE) if kind < ABRUPT + DRAWN_OUT else 0

    def silence(self, clip: Clip) -> tuple[int, int]:
        """Return the numbers of silent frames at the start and at the end of a clip, see `QUIET`."""
        levels = self.rows[clip.pack][clip.offset : clip.offset + clip.length].mean(1)
        low, high = np.quantile(levels, (0.02, 0.95))
        loud = np.flatnonzero(levels > low + QUIET * (high - low))
        return (int(loud[0]), clip.length - 1 - int(loud[-1])) if len(loud) else (0, 0)

    def epoch(
        self,
        batch_frames: int,
        rng: random.Random,
        longest: int = MAX_FRAMES,
        portions: Mapping[str, float] = NO_PORTIONS,
    ) -> list[list[Item]]:
        """Return training batches in random order, as lists of items with at most `batch_frames` padded frames."""
        batches = bucketed(self.items(rng, longest, portions), batch_frames)
        rng.shuffle(batches)
        return batches

    def in_order(self, batch_frames: int) -> Iterator[Batch]:
        """Yield batches of unchanged clips, short ones first."""
        for items in bucketed([Item([clip], 1.0) for clips in self.clips for clip in clips], batch_frames):
            yield self.batch(items)


def num_frames(clip: Clip, tempo: float) -> int:
    """Return the number of frames of a clip played `tempo` times as fast."""
    return clip.length if tempo == 1 else int((clip.length - 2) / tempo)


def played(clip: Clip, tempo: float) -> Tensor:
    """Return the positions from which frames are read to play a clip `tempo` times as fast; see `rhythm`."""
    return torch.arange(clip.length, dtype=torch.float32) if tempo == 1 else rhythm(num_frames(clip, tempo), tempo)


def rhythm(count: int, tempo: float) -> Tensor:
    """Return positions in a clip from which `count` frames are read. The tempo varies, as rhythm does between people.

    Some parts are up to 30 % faster and others slower. Overall, the clip is `tempo` times as fast.
    """
    steps = torch.arange(count)
    period = 50 + 150 * float(torch.rand(()))
    swing = 0.3 * float(torch.rand(())) * period / (2 * math.pi)
    waves = (2 * math.pi * (steps / period + torch.rand(()))).sin()
    ends = (torch.minimum(steps, count - 1 - steps) / period).clamp(max=1)
    return (tempo * (steps + swing * ends * waves)).clamp(min=0, max=tempo * (count - 1))


def bucketed(items: list[Item], batch_frames: int) -> list[list[Item]]:
    """Return batches of items with similar padded lengths. Items of an incomplete batch move to the next longer batch.

    Few different shapes matter more than little padding, because oneDNN compiles a kernel for each shape.
    """
    buckets: dict[int, list[Item]] = {}
    for item in items:
        length = item.num_frames
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
