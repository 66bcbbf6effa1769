"""Records the tokens that each expert of a float32 encoder receives for recordings, in temporary files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.quantize.routing import ExpertInputs, RoutedLayer
from u2moe.runtime.bundle.bundle import Bundle
from u2moe.runtime.errors import BundleError

Array = npt.NDArray[Any]
_PIECE_FRAMES = 3000
"""Feature frames per encoder call: attention over a whole long recording would need too much memory."""


class ExpertTokens:
    """Calibration tokens by layer and expert.

    Attributes:
        seconds: seconds of audio.
        num_compensated: experts seen so far that had enough tokens for calibration; `num_plain`: those that had not.
    """

    def __init__(
        self, folder: Path, layers: Mapping[str, RoutedLayer], seconds: float, progress: Callable[[str], None]
    ) -> None:
        """The file of a layer in `folder` has its name and holds its tokens, float32 [n, dim]."""
        self.folder, self.layers, self.seconds, self.progress = folder, layers, seconds, progress
        self.num_compensated = self.num_plain = 0

    def by_expert(self, name: str, num_experts: int) -> Iterator[tuple[Array, Array] | None]:
        """For each expert of the layer, its tokens [n, dim] and its routing weight [n] for each of them.

        None for experts with fewer tokens than inputs, and for all experts outside the encoder.
        """
        if name not in self.layers:
            yield from [None] * num_experts
            return
        self.progress(f"calibration: rounding {name}")
        dim = len(self.layers[name].gate)
        tokens = np.fromfile(self.folder / name, np.float32).reshape(-1, dim)
        shares = self.layers[name].shares(tokens)
        for own in shares.T:
            (chosen,) = np.nonzero(own)
            enough = len(chosen) >= dim
            self.num_compensated += enough
            self.num_plain += not enough
            yield (tokens[chosen], own[chosen]) if enough else None

    def data(self) -> dict[str, float]:
        """Statistics for the manifest and the report."""
        return {
            "seconds": round(self.seconds, 2),
            "compensated_experts": self.num_compensated,
            "plain_experts": self.num_plain,
        }


@contextmanager
def recorded(
    bundle: Bundle, features: Sequence[Array], beside: Path, progress: Callable[[str], None]
) -> Iterator[ExpertTokens]:
    """Run the encoder of a float32 bundle over features [frames, mel] of recordings, with full context.

    The temporary folder is created in `beside`, because the system's is often in memory.

    Raises:
        BundleError: the encoder has no mixture of experts.
    """
    encoder = ExpertInputs(bundle)
    layers = encoder.layers
    if not layers:
        raise BundleError(f"{bundle.path}: its encoder has no mixture of experts, which calibration is for")
    with tempfile.TemporaryDirectory(prefix="tokens-", dir=beside, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with ExitStack() as stack:
            written = {layer: stack.enter_context((folder / layer).open("wb")) for layer in layers}
            for number, frames in enumerate(features):
                if number % 20 == 0:
                    progress(f"calibration: recording {number + 1} of {len(features)}")
                for begin in range(0, len(frames), _PIECE_FRAMES):
                    for layer, tokens in encoder.tokens(frames[begin : begin + _PIECE_FRAMES]).items():
                        written[layer].write(np.ascontiguousarray(tokens).tobytes())
        del encoder  # its weights are not needed any more
        seconds = sum(map(len, features)) * bundle.manifest.features.frame_shift_ms / 1000
        yield ExpertTokens(folder, layers, seconds, progress)
