"""Turns the speakers of the games into others with a vocoder (WORLD): other vocal tracts, pitch and manner.

Run it again to resume. One analysis serves several variants. Only clips of the split `train` are taken.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyworld
from corpus import SAMPLE_RATE, SPEECH, Pack, to_pcm
from games import GAMES, Samples, read_lines
from numpy.typing import NDArray

VARIANTS = 3
FRAME_MS = 10.0
Track = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a variant differs: factors on the frequencies of the vocal tract, on the pitch, and on its movement."""

    tract: float
    pitch: float
    movement: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Manner":
        """Tracts up to 15 % shorter or longer, pitch up to 30 % higher or lower, mostly together."""
        tract = rng.uniform(-0.15, 0.15)
        pitch = np.clip(tract + rng.uniform(-0.25, 0.25), -0.3, 0.3)
        return cls(tract=float(np.exp(tract)), pitch=float(np.exp(pitch)), movement=rng.uniform(0.7, 1.4))


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """A voice taken apart: pitch [frames] in Hz (0: none), spectral envelope and aperiodicity [frames, bins]."""

    pitch: Track
    envelope: Track
    aperiodicity: Track

    @classmethod
    def of(cls, samples: Samples) -> "Analysis":
        """The analysis of a clip at `SAMPLE_RATE`; WORLD cannot tell voiced from unvoiced speech below 16 kHz."""
        rate = SAMPLE_RATE
        wave = samples.astype(np.float64)
        pitch, times = pyworld.dio(wave, rate, frame_period=FRAME_MS)
        pitch = pyworld.stonemask(wave, pitch, times, rate)
        envelope = pyworld.cheaptrick(wave, pitch, times, rate)
        return cls(pitch=pitch, envelope=envelope, aperiodicity=pyworld.d4c(wave, pitch, times, rate))

    def spoken(self, manner: Manner) -> Samples:
        """The same words by another speaker, at a peak of 0.5."""
        voiced = self.pitch > 0
        pitch = self.pitch.copy()
        if voiced.any():
            mean = np.log(pitch[voiced]).mean()
            pitch[voiced] = np.exp(mean + manner.movement * (np.log(pitch[voiced]) - mean)) * manner.pitch
        envelope, aperiodicity = (stretched(track, manner.tract) for track in (self.envelope, self.aperiodicity))
        wave = pyworld.synthesize(pitch, envelope, aperiodicity, SAMPLE_RATE, FRAME_MS)
        return np.asarray(wave * (0.5 / max(np.abs(wave).max(), 1e-3)), np.float32)


def stretched(track: Track, factor: float) -> Track:
    """A track [frames, bins] with what was at a frequency at a factor times that; above the highest, the last value."""
    position = np.minimum(np.arange(track.shape[1]) / factor, track.shape[1] - 1)
    left = np.minimum(position.astype(int), track.shape[1] - 2)
    share = position - left
    return np.ascontiguousarray(track[:, left] * (1 - share) + track[:, left + 1] * share)


def revoice(game: str, debian: Path, folder: Path) -> str:
    """Fills the pack of a game's other speakers; returns a line for the terminal."""
    with Pack(folder / f"{game}-revoiced", SPEECH) as pack:
        done = len(pack.utterances)
        for clip, line in enumerate(read_lines(game, "train", debian, start=done // VARIANTS), start=done // VARIANTS):
            analysis = Analysis.of(line.wideband)
            for number in range(max(done, clip * VARIANTS), (clip + 1) * VARIANTS):
                manner = Manner.draw(np.random.default_rng(number))
                pack.append(to_pcm(analysis.spoken(manner)), f"{line.voice}-{number}", line.text)
        return f"{pack.table_path.stem}: {len(pack.utterances)} utterances, {pack.num_rows / SAMPLE_RATE / 3600:.2f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--debian", type=Path, required=True, help="folder with the unpacked Debian packages")
    parser.add_argument("--games", nargs="*", default=list(GAMES))
    args = parser.parse_args()
    for game in args.games:
        print(revoice(game, args.debian, args.work_dir / "speech"), flush=True)


if __name__ == "__main__":
    main()
