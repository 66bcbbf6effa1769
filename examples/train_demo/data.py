"""The data of a run: packs of features, which are read again for every epoch, and the validation sets."""
# ruff: noqa: SIM905 - lists of words read better as words

import random
from pathlib import Path
from typing import Any

import torch
from augment import Augmenter
from batches import Corpus, Item, Tokenizer
from corpus import MEL_FLOOR, MEL_STEP, MELS, NUM_MELS, Pack
from progress import Options, Progress
from withheld import TESTS, VALIDATION, Withheld, read_sentences

EASY_VOICES, EASY_FRAMES = ("hibari", "pico-us"), 250
"""Packs with which a run starts, and the longest clip in frames."""
HALVED = "espeak espeak-words flite-kal16 flite-awb flite-rms hibari hibari-others pico-gb pico-us".split()
PORTIONS = dict.fromkeys(HALVED, 0.5)
"""Share of a pack that an epoch uses, for packs that are not used in full."""


class Data:
    """Packs of features, and the batches of an epoch."""

    def __init__(self, work_dir: Path, options: Options) -> None:
        self.features = work_dir / "features"
        self.tokenizer = Tokenizer(work_dir)
        self.options = options
        self.withheld = Withheld(read_sentences(work_dir / "test", TESTS))
        self.targets = work_dir / "targets" if options.teacher_weight else None
        self.validation = {
            name: Corpus([self.features / name], self.tokenizer, targets=self.targets) for name in VALIDATION
        }
        self.noise = torch.from_numpy(Pack(self.features / "noise", MELS).map().copy()) * MEL_STEP + MEL_FLOOR

    def corpus(self, progress: Progress) -> Corpus:
        """Return the training data of this epoch. At its beginning, the sizes of the packs are noted in `progress`."""
        if progress.position == 0:
            names = sorted(path.stem for path in self.features.glob("*.mel"))
            progress.sizes = {}
        else:
            names = sorted(progress.sizes)
        names = [name for name in names if name not in {*VALIDATION, "noise"}]
        paths = [self.features / name for name in names]
        corpus = Corpus(paths, self.tokenizer, self.withheld.allows, progress.sizes or None, self.targets)
        progress.sizes = corpus.sizes
        return corpus

    def epoch(self, corpus: Corpus, progress: Progress) -> list[list[Item]]:
        """Return the remaining batches of an epoch."""
        rng = random.Random(f"{self.options.seed} {progress.epoch}")
        if progress.easy:
            rest = {name: 0.0 for name in corpus.names if name not in EASY_VOICES}
            batches = corpus.epoch(self.options.batch_frames // 2, rng, EASY_FRAMES, rest)
        else:
            batches = corpus.epoch(self.options.batch_frames, rng, portions=PORTIONS)
        return batches[progress.position :]

    def statistics(self, corpus: Corpus, augmenter: Augmenter) -> dict[str, Any]:
        """Return WeNet's global_cmvn, from 60 augmented batches."""
        torch.manual_seed(self.options.seed)
        total, square, count = torch.zeros(NUM_MELS, dtype=torch.double), torch.zeros(NUM_MELS, dtype=torch.double), 0
        for items in corpus.epoch(self.options.batch_frames, random.Random(0))[:60]:
            batch = corpus.batch(items)
            mels = augmenter(batch.mels, batch.lengths)
            frames = mels[torch.arange(mels.shape[1]) < batch.lengths.unsqueeze(1)].double()
            total, square, count = total + frames.sum(0), square + (frames**2).sum(0), count + len(frames)
        return {"mean_stat": total.tolist(), "var_stat": square.tolist(), "frame_num": count}
