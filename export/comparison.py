"""Compares tensors with their expected values. Does not need torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.manifest import Manifest
from u2moe.runtime.errors import ParityError
from u2moe.runtime.model.features import fbank
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import SessionSettings

Array = npt.NDArray[Any]

LIMIT = 1e-4
"""Largest accepted absolute difference while no value exceeds 1. For larger values the limit grows in proportion, as
float32 rounding does. Two correct float32 programs that add in different orders differ by 1e-6 to 3e-5 after 24
blocks."""
LOG_PROBABILITIES = ("log_probs", "score", "r_score", "next_log_probs")
REACH_OF_LOG_PROBABILITIES = 100.0
"""Magnitude of log-probabilities above which their limit grows. Trained networks reach about -30, with differences of
at most 1e-4. An untrained network with tied embeddings reaches -330, where float32 has steps of 3e-5."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of one tensor in one case."""

    case: str
    tensor: str
    difference: float
    """Largest absolute difference."""
    limit: float
    num_values: int
    rounding: float | None = None
    """Difference between torch in float32 and in float64; None unless `difference` is measured from float64."""

    @property
    def is_equal(self) -> bool:
        """Whether the difference is within its limit."""
        return self.difference <= self.limit

    def told(self, sides: str) -> str:
        """Describe the difference and its limit; `sides` names the two programs that were compared."""
        if self.rounding is None:
            return f"largest difference {self.difference:.3g} between {sides}, limit {self.limit:.3g}"
        return (
            f"largest difference {self.difference:.3g} between torch in float64 and onnxruntime, "
            f"limit {self.limit:.3g}; torch in float32 differs by {self.rounding:.3g}"
        )


@dataclass(kw_only=True)
class ParityReport:
    """The results of all comparisons."""

    sides: str = "torch and onnxruntime"
    comparisons: list[Comparison] = field(default_factory=list)
    tokens_per_expert: dict[str, list[int]] = field(default_factory=dict)
    """Number of tokens that each expert of each layer processed during the comparisons."""
    num_redrawn: int = 0
    """Number of inputs that were drawn again because of a near tie in a router."""

    def add(self, found: Comparison, where: object, sides: str, reason: str = "") -> None:
        """Add a comparison of two programs, named by `sides`, which must be within its limit.

        The ParityError names `where`, the case, the tensor, the difference and the limit.
        """
        if not found.is_equal:
            raise ParityError(f"{where}: {found.case}: {found.tensor}: {found.told(sides)}{reason}")
        self.comparisons.append(found)

    @property
    def worst(self) -> Comparison:
        """The comparison closest to its limit."""
        return max(self.comparisons, key=lambda item: item.difference / item.limit)


def compared(case: str, tensor: str, pairs: list[tuple[Array, Array]]) -> Comparison:
    """Return the largest difference between expected and found values, with its limit."""
    difference = largest = 0.0
    for expected, found in pairs:
        if expected.shape != found.shape:
            raise ParityError(f"{case}: {tensor}: shape is {found.shape}, expected {expected.shape}")
        if expected.size:
            # NaN counts as an infinite difference, so it never passes
            difference = max(difference, float(np.nan_to_num(np.abs(expected - found), nan=np.inf).max()))
            largest = max(largest, float(np.abs(expected).max()))
    limit = LIMIT * max(1.0, largest / (REACH_OF_LOG_PROBABILITIES if tensor in LOG_PROBABILITIES else 1.0))
    num_values = sum(expected.size for expected, _ in pairs)
    return Comparison(case=case, tensor=tensor, difference=difference, limit=limit, num_values=num_values)


def compare_features(file: Path, manifest: Manifest) -> Comparison:
    """Compare the graph in `file` with the runtime's features, on noise and short inputs. Raises ParityError."""
    session = Session(file, contract.features(), manifest, SessionSettings())
    noise, length = parity_samples(manifest, 2.0), manifest.features.frame_len
    difference, num_values = 0.0, 0
    for samples in (noise, *(noise[:number] for number in (0, 1, length - 1, length))):
        expected = fbank(samples, manifest.features)
        found = session.run({"samples": samples[np.newaxis]})["features"][0]
        if found.shape != expected.shape:
            told = f"{len(samples)} samples yield features of shape {found.shape}, expected {expected.shape}"
            raise ParityError(f"{file}: {told}")
        difference = max(difference, float(np.abs(found - expected).max(initial=0.0)))
        num_values += expected.size
    if not difference <= LIMIT:
        raise ParityError(f"{file}: features differ from the runtime's by {difference:.3g}, limit {LIMIT:.3g}")
    return Comparison(case="front end", tensor="features", difference=difference, limit=LIMIT, num_values=num_values)


def parity_samples(manifest: Manifest, seconds: float) -> Array:
    """Return seeded noise [samples] that swells and fades as speech does."""
    num_samples = int(seconds * manifest.features.sample_rate)
    noise = np.random.default_rng(0).standard_normal(num_samples)
    swell = np.abs(np.sin(np.arange(num_samples) / 3000)) * 0.2
    return (noise * swell).astype(np.float32)


def parity_features(manifest: Manifest, seconds: float) -> Array:
    """Return features [frames, mel] of `parity_samples`."""
    return fbank(parity_samples(manifest, seconds), manifest.features)
