"""The learning rate over the steps of a stage."""

import math
from dataclasses import dataclass

RESTART_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate with a warm-up, a constant rate, and a decay to zero at the end of a stage (WSD, arXiv 2404.06395).

    The number of steps need not be known in advance. Training can continue for days at a constant rate. At any step, a
    decay to a finished model can branch off.
    """

    peak: float
    warmup_steps: int
    decay_from: int | None = None
    """Step at which the decay begins. None: not decided yet."""
    decay_steps: int = 0
    restart: int | None = None
    """Step at which the rate rises from 0 again, because the optimizer's moments start again there."""

    def __post_init__(self) -> None:
        if self.peak <= 0 or self.warmup_steps < 1:
            raise ValueError(f"peak must be above 0 and warmup_steps at least 1, got {self}")
        if self.decay_from is not None and self.decay_steps < 1:
            raise ValueError(f"decay_steps must be at least 1, got {self.decay_steps}")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, from 0 on. The decay is one minus a square root (arXiv 2405.18392)."""
        rate = self.peak * min((step + 1) / self.warmup_steps, 1.0)
        if self.restart is not None:
            rate *= min((step - self.restart + 1) / RESTART_STEPS, 1.0)
        if self.decay_from is None or step < self.decay_from:
            return rate
        return rate * max(1 - math.sqrt((step - self.decay_from + 1) / self.decay_steps), 0.0)

    @property
    def end(self) -> int | None:
        """Number of steps after which training ends. None: unknown."""
        return None if self.decay_from is None else self.decay_from + self.decay_steps
