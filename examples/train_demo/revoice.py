"""Changes the speakers of recordings with a vocoder (WORLD): vocal tract, pitch and manner. Run it again to resume.

It reads packs of speech, of actors and of synthetic voices, and writes others. Several variants share one analysis.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyworld
from corpus import SAMPLE_RATE, SPEECH, Pack, to_float, to_pcm
from manners import REVOICED, VARIANTS, Manner, Track, stretched
from numpy.typing import NDArray

FRAME_MS = 10.0
Samples = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Parts of a voice: pitch [frames] in Hz, spectral envelope and aperiodicity [frames, bins]. Pitch 0: unvoiced."""

    pitch: Track
    envelope: Track
    aperiodicity: Track

    @classmethod
    def of(cls, samples: Samples) -> "Analysis":
        """Analyse a clip at `SAMPLE_RATE`. Below 16 kHz, WORLD cannot separate voiced from unvoiced speech."""
        rate = SAMPLE_RATE
        wave = samples.astype(np.float64)
        pitch, times = pyworld.dio(wave, rate, frame_period=FRAME_MS)
        pitch = pyworld.stonemask(wave, pitch, times, rate)
        envelope = pyworld.cheaptrick(wave, pitch, times, rate)
        return cls(pitch=pitch, envelope=envelope, aperiodicity=pyworld.d4c(wave, pitch, times, rate))

    def spoken(self, manner: Manner) -> Samples:
        """Return the same words by another speaker, scaled to a peak of 0.5."""
        pitch = manner.melody(self.pitch)
        envelope, aperiodicity = (stretched(track, manner.tract) for track in (self.envelope, self.aperiodicity))
        wave = pyworld.synthesize(pitch, envelope, aperiodicity, SAMPLE_RATE, FRAME_MS)
        return np.asarray(wave * (0.5 / max(np.abs(wave).max(), 1e-3)), np.float32)


def revoice(source: Pack, num_variants: int, path: Path) -> str:
    """Fill the pack that has the utterances of `source` by other speakers. Return a line for the terminal."""
    samples = source.map()
    with Pack(path, SPEECH) as pack:
        start = len(pack.utterances) // num_variants
        for index, utterance in enumerate(source.utterances[start:], start=start):
            analysis = Analysis.of(to_float(samples[utterance.offset : utterance.offset + utterance.length]))
            for number in range(max(len(pack.utterances), index * num_variants), (index + 1) * num_variants):
                speech = analysis.spoken(Manner.draw(np.random.default_rng(number)))
                pack.append(to_pcm(speech), f"{utterance.voice}-{number}", utterance.text)
        return f"{path.name}: {len(pack.utterances)} utterances, {pack.num_rows / SAMPLE_RATE / 3600:.2f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--packs", nargs="*", default=list(VARIANTS))
    args = parser.parse_args()
    speech = args.work_dir / "speech"
    for name in args.packs:
        print(revoice(Pack(speech / name, SPEECH), VARIANTS[name], speech / f"{name}{REVOICED}"), flush=True)


if __name__ == "__main__":
    main()
