"""Reports of a running training: a log, a table of validation scores, and timers."""

import math
import shutil
import time
from pathlib import Path

from gradients import LOGGED, Outcome
from progress import Progress
from validation import Score

LOGS = ("train.log", "validation.tsv")


class Log:
    """Log of a run: lines on the terminal and in a file, and a table of validation scores next to that file."""

    def __init__(self, folder: Path) -> None:
        self.path, self.table = (folder / name for name in LOGS)

    def __call__(self, line: str) -> None:
        """Write one line."""
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def score(self, progress: Progress, name: str, score: Score) -> None:
        """Write the scores on a validation set to the log and to the table."""
        self(f"       {name} {score}")
        hours = f"{progress.seconds / 3600:.3f}\t{progress.speech_seconds / 3600:.1f}"
        with self.table.open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write("step\thours\thours heard\tset\tchunk\tctc\tleft\tright\tword error rate\n")
            file.write(f"{progress.step}\t{hours}\t{name}\t{score.columns()}\n")


def bring_logs(checkpoint: Path, folder: Path) -> None:
    """Copy the logs next to a checkpoint of the run named like `folder` into the folder, unless it has logs."""
    for name in LOGS:
        source, target = checkpoint.with_name(name), folder / name
        if checkpoint.stem == folder.name and source.exists() and not target.exists():
            shutil.copyfile(source, target)


class Report:
    """Means of losses and speed since the last line of the log."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.norms: list[float] = []
        self.since = time.monotonic()

    def add(self, outcomes: list[Outcome], norm: float) -> None:
        """Count one step."""
        self.outcomes += outcomes
        self.norms.append(norm)

    def __str__(self) -> str:
        def trained(name: str) -> list[float]:
            found: list[float] = [getattr(outcome, name) for outcome in self.outcomes]
            return [value for value in found if not math.isnan(value)]

        speech = sum(outcome.num_frames for outcome in self.outcomes) / 100
        speed = speech / (time.monotonic() - self.since)
        norm = sum(self.norms) / len(self.norms)
        parts = [f"{name} {sum(values) / len(values):.3f}" for name in LOGGED if (values := trained(name))]
        return f"{' '.join(parts)} grad {norm:.2f} x{speed:.0f}"


class Clock:
    """Timer of a periodic event."""

    def __init__(self, minutes: float) -> None:
        self.period = 60 * minutes
        self.since = time.monotonic()

    def due(self) -> bool:
        """Return whether the time is up. If so, restart the timer."""
        if time.monotonic() - self.since < self.period:
            return False
        self.since = time.monotonic()
        return True
