"""Differences between speakers who say the same words: vocal tract and pitch."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REVOICED = "-revoiced"
"""Suffix for the name of a pack that has the same utterances by other speakers."""
VARIANTS = {
    "queen-train": 3,
    "sky-train": 3,
    "drascula-train": 3,
    "hibari-words": 2,
    "pico-us-words": 2,
    "pico-gb-words": 2,
}
"""Packs that are revoiced, and number of other speakers for each utterance of a pack."""
Track = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Manner:
    """Changes to a voice: factors for the vocal tract's frequencies, for the pitch, and for movements of the pitch."""

    tract: float
    pitch: float
    movement: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Manner":
        """Draw a manner. The tract is up to 15 % shorter or longer, and the pitch up to 30 % higher or lower.

        Shorter tracts mostly come with a higher pitch.
        """
        tract = rng.uniform(-0.15, 0.15)
        pitch = np.clip(tract + rng.uniform(-0.25, 0.25), -0.3, 0.3)
        return cls(tract=float(np.exp(tract)), pitch=float(np.exp(pitch)), movement=rng.uniform(0.7, 1.4))

    def melody(self, pitch: Track) -> Track:
        """Return the pitch [frames] in Hz of the same words in this manner. 0 means unvoiced."""
        voiced = pitch > 0
        other = pitch.copy()
        if voiced.any():
            mean = np.log(pitch[voiced]).mean()
            other[voiced] = np.exp(mean + self.movement * (np.log(pitch[voiced]) - mean)) * self.pitch
        return other


def stretched(track: Track, factor: float) -> Track:
    """Scale the frequency axis of a track [frames, bins]. Above the highest frequency, the last value is repeated."""
    position = np.minimum(np.arange(track.shape[1]) / factor, track.shape[1] - 1)
    left = np.minimum(position.astype(int), track.shape[1] - 2)
    share = position - left
    return np.ascontiguousarray(track[:, left] * (1 - share) + track[:, left + 1] * share)
