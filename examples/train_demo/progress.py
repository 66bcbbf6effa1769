"""The options that determine the steps of a run, and its progress."""

from dataclasses import dataclass, field

from schedule import Schedule


@dataclass(kw_only=True)
class Progress:
    """The progress of a run."""

    step: int = 0
    batches: int = 0
    """Number of batches processed so far."""
    epoch: int = 0
    position: int = 0
    """Number of finished batches of this epoch."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Number of utterances in each pack when the epoch began."""
    easy: bool = True
    """Whether to use only CTC and short, clean clips. This lasts until CTC has found an alignment."""
    ctc: float = 10.0
    """Running mean of the CTC loss."""
    seconds: float = 0.0
    speech_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that, with the data, determine the steps of a run."""

    lr: float = 3e-3
    warmup_steps: int = 300
    decay_from: int | None = None
    decay_steps: int = 0
    batch_frames: int = 9600
    """Maximum number of padded frames in a batch."""
    num_batches: int = 2
    """Number of batches in a step."""
    augment: float = 0.7
    """Share of the utterances under new conditions."""
    views: int = 1
    """Number of views. With 2, every utterance occurs under two conditions in a batch, and outputs should agree."""
    channels: int = 32
    """Number of channels of the first convolution that are used."""
    restart: int | None = None
    """Step at which a mixture forked from a dense run. There, the learning rate rises from 0 again."""
    teacher_weight: float = 0.0
    """Weight of the distance from a teacher's targets, see `teacher.py`."""
    averaged_from: int = 0
    """First step in the average. Weights from before a change may be near another minimum of the loss."""
    seed: int = 1

    def __post_init__(self) -> None:
        if self.views not in (1, 2):
            raise ValueError(f"views must be 1 or 2, got {self.views}")

    @property
    def schedule(self) -> Schedule:
        """The learning rate."""
        return Schedule(
            peak=self.lr,
            warmup_steps=self.warmup_steps,
            decay_from=self.decay_from,
            decay_steps=self.decay_steps,
            restart=self.restart,
        )
