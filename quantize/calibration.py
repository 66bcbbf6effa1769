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
        enough: by layer seen so far, whether each expert had enough tokens for calibration.
    """

    def __init__(self, folder: Path, layers: Mapping[str, RoutedLayer], progress: Callable[[str], None]) -> None:
        """The file of a layer in `folder` has its name and holds its tokens, float32 [n, dim]."""
        self.folder, self.layers, self.progress = folder, layers, progress
        self.enough: dict[str, list[bool]] = {}

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
        enough = self.enough[name] = []
        for own in shares.T:
            (chosen,) = np.nonzero(own)
            enough.append(len(chosen) >= dim)
            yield (tokens[chosen], own[chosen]) if enough[-1] else None

    def data(self) -> dict[str, float]:
        """Statistics for the manifest and the report."""
        enough = [each for layer in self.enough.values() for each in layer]
        return {"compensated_experts": sum(enough), "plain_experts": len(enough) - sum(enough)}


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
        yield ExpertTokens(folder, layers, progress)
