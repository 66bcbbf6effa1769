"""What determines the steps of a run, and how far it has come."""

from dataclasses import dataclass, field

from schedule import Schedule


@dataclass(kw_only=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    batches: int = 0
    """Batches worked on in all."""
    epoch: int = 0
    position: int = 0
    """Batches of this epoch that are done."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Utterances in each pack when the epoch began."""
    easy: bool = True
    """Short, clean clips and CTC alone, until CTC has found its alignment."""
    ctc: float = 10.0
    """Running mean of the CTC loss."""
    seconds: float = 0.0
    speech_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What determines the steps of a run besides its data."""

    lr: float = 3e-3
    warmup_steps: int = 300
    decay_from: int | None = None
    decay_steps: int = 0
    batch_frames: int = 9600
    """Padded frames in a batch."""
    num_batches: int = 2
    """Batches in a step."""
    augment: float = 0.7
    """Share of the utterances under new conditions."""
    views: int = 1
    """2: every utterance is heard under two conditions in one batch, and should be understood alike in both."""
    channels: int = 32
    """Of the first convolution."""
    restart: int | None = None
    """Step at which a mixture forked from a dense run: the rate rises anew from 0."""
    teacher_weight: float = 0.0
    """Of the distance from what a teacher makes of the speech, see `teacher.py`."""
    averaged_from: int = 0
    """Step from which weights are averaged: what they were before a change may lie in another valley."""
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
