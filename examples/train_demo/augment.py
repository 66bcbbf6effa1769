"""Augments log-mel batches: other speakers, noise, loudness, spectral colour, band limits and SpecAugment.

All changes are made to mel energies and cost almost nothing, so every epoch has new conditions.
"""

import math

import torch
from torch import Tensor

DECIBEL = math.log(10) / 10
NUM_TRACTS = 256
SMOOTHED = 4
LOW_MEL, HIGH_MEL = (1127 * math.log1p(hertz / 700) for hertz in (20.0, 8000.0))


def mel_centers(num_mels: int) -> Tensor:
    """Return the centre frequencies of Kaldi's filters at 16 kHz, in Hz."""
    step = (HIGH_MEL - LOW_MEL) / (num_mels + 1)
    return 700 * torch.expm1((LOW_MEL + step * torch.arange(1, num_mels + 1)) / 1127)


def warps(num_mels: int, factors: Tensor) -> Tensor:
    """Return matrices [count, mels, mels] that scale frequencies by `factors` [count, mels]."""
    step = (HIGH_MEL - LOW_MEL) / (num_mels + 1)
    mel = 1127 * torch.log1p(mel_centers(num_mels) * factors / 700)
    source = ((mel - LOW_MEL) / step - 1).clamp(0, num_mels - 1)
    distance = source.unsqueeze(1) - torch.arange(num_mels).view(1, -1, 1)
    return (1 - distance.abs()).clamp(min=0)


def smoothing(num_mels: int) -> Tensor:
    """Return a matrix [mels, mels] that replaces each mel by its mean with the `SMOOTHED` mels on either side."""
    index = torch.arange(num_mels)
    near = ((index.unsqueeze(1) - index).abs() <= SMOOTHED).float()
    return near / near.sum(0)


def tracts(num_mels: int, count: int) -> Tensor:
    """Return the frequency factors [count, mels] of other vocal tracts, the same for every call.

    A tract is up to 18 % shorter or longer overall. Throats and mouths vary independently, so formants do not all move
    by the same factor. A smooth curve therefore changes the factors by up to 6 %.
    """
    generator = torch.Generator().manual_seed(1)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=generator)

    position = torch.linspace(-1, 1, num_mels)
    bend = uniform(-0.06, 0.06) * torch.cos(math.pi * (position * uniform(0.5, 1.5) + uniform(-1, 1)))
    return (uniform(-0.17, 0.17) + bend).exp()


class Augmenter:
    """Puts speech under random conditions. `noise` [frames, mels] contains log-mels of background sounds and music."""

    def __init__(self, noise: Tensor, share: float) -> None:
        self.noise = noise
        self.share = share
        self.num_mels = noise.shape[1]
        self.centers = mel_centers(self.num_mels)
        self.warps = warps(self.num_mels, tracts(self.num_mels, NUM_TRACTS))
        self.smoothing = smoothing(self.num_mels)

    def __call__(self, mels: Tensor, lengths: Tensor) -> Tensor:
        """Return log-mels [batch, frames, mels] with a share of the utterances under new conditions.

        `lengths` [batch] are the numbers of valid frames.
        """
        clean = mels
        batch, num_frames, _ = mels.shape

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(batch, 1, 1)

        def chance(probability: float) -> Tensor:
            return torch.rand(batch, 1, 1) < probability

        # another speaker: the vocal tract, and the sharpness of its resonances
        tract = mels @ self.warps[torch.randint(len(self.warps), (batch,))]
        mels = torch.where(chance(0.75), tract, mels)
        sharpness = torch.where(chance(0.5), uniform(-0.4, 0.3), 0.0)
        mels = mels + sharpness * (mels - mels @ self.smoothing)
        level = (mels.exp().sum((1, 2)) / lengths / self.num_mels).log().view(-1, 1, 1)

        # background: ambience or music, then the hiss of the room
        start = torch.randint(len(self.noise) - num_frames, (batch, 1))
        noise = self.noise[start + torch.arange(num_frames)]
        noise = noise - noise.exp().mean((1, 2), keepdim=True).log() + level - DECIBEL * uniform(3, 30)
        noise = torch.where(chance(0.5), noise, -20.0)
        hiss = level - DECIBEL * uniform(15, 70) + 0.03 * uniform(-1, 1) * torch.arange(self.num_mels)
        hiss = hiss + 0.35 * torch.randn_like(mels)
        mels = torch.logaddexp(mels, torch.logaddexp(noise, hiss))

        # the channel: loudness, colour, band, and the floor of a digital recording
        position = torch.linspace(-1, 1, self.num_mels)
        colour = uniform(-1.5, 1.5) * position
        for _ in range(2):
            colour = colour + uniform(-0.7, 0.7) * torch.cos(math.pi * (position * uniform(0.5, 3) + uniform(-1, 1)))
        mels = mels + colour + DECIBEL * uniform(-22, 6)
        high = torch.where(chance(0.5), uniform(3300, 4100), uniform(4300, 6000))
        high = torch.where(chance(0.55), high, 9000.0)
        low = torch.where(chance(0.3), uniform(80, 350), 0.0)
        steepness = uniform(8, 60)
        over = (self.centers / high).log().clamp(min=0) + (low / self.centers).clamp(min=1).log() * 0.15
        floor = uniform(-15, 5) + 0.35 * torch.randn_like(mels)
        mels = torch.logaddexp(mels - (steepness * over).clamp(max=20), floor)
        return torch.where(chance(self.share), self.masked(mels, lengths), clean)

    def masked(self, mels: Tensor, lengths: Tensor) -> Tensor:
        """Apply SpecAugment (arXiv 1904.08779): mask two bands of up to 12 mels, and two spans of frames.

        A span has up to 40 frames, but at most a fifth of the utterance.
        """
        bins, frames = torch.arange(self.num_mels), torch.arange(mels.shape[1])
        hidden = torch.zeros(mels.shape, dtype=torch.bool)
        for _ in range(2):
            width = torch.randint(13, (len(mels), 1))
            begin = torch.randint(self.num_mels - 12, (len(mels), 1))
            hidden |= ((bins >= begin) & (bins < begin + width)).unsqueeze(1)
            width = torch.rand(len(mels), 1) * (lengths.unsqueeze(1) / 5).clamp(max=40)
            begin = torch.rand(len(mels), 1) * (lengths.unsqueeze(1) - width)
            hidden |= ((frames >= begin) & (frames < begin + width)).unsqueeze(2)
        return torch.where(hidden, mels.mean((1, 2), keepdim=True), mels)
