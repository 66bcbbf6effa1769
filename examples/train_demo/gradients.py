"""Computes the gradients of a step. A step has a few batches, which are distributed over processes.

The processes also share the optimizer's work on matrices. The random numbers of a batch depend only on the seed and on
the number of the batch. A run that is resumed, or continues with more processes, therefore takes the same steps.
"""

import multiprocessing
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

import torch
from augment import Augmenter
from batches import Corpus, Item
from objective import Losses, Objective, losses, random_chunk
from optimizers import orthogonalize, work
from torch import Tensor

from u2moe.export.model import SpeechModel

LOGGED = ("ctc", "left", "right", "teacher")
"""Names of the parts of the loss."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Description of the work on one batch."""

    number: int
    """Number of the batch in the run. Together with the seed, it determines all random numbers."""
    items: list[Item]
    easy: bool
    """Whether to train only CTC, on unchanged clips and with full context."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Losses of a batch and its number of frames. The loss of a part that was not trained is nan."""

    ctc: float
    left: float
    right: float
    teacher: float
    num_frames: int


class GradientSource:
    """Computes the gradient of a task on a network."""

    def __init__(
        self,
        model: SpeechModel,
        corpus: Corpus,
        augmenter: Augmenter,
        objective: Objective,
        *,
        seed: int,
        device: str,
        two_views: bool = False,
    ) -> None:
        self.model, self.corpus, self.augmenter = model, corpus, augmenter
        self.objective, self.seed, self.device, self.two_views = objective, seed, device, two_views

    def losses(self, task: Task) -> tuple[Losses, int]:
        """Return the losses of a batch, and its number of frames."""
        drawn = zlib.crc32(f"{self.seed} {task.number}".encode())
        rng = random.Random(drawn)
        torch.manual_seed(drawn)
        batch = self.corpus.batch(task.items)
        two_views = self.two_views and not task.easy
        batch = batch.twice() if two_views else batch
        frames = int(batch.lengths.sum())
        chunk_sizes: list[int | None] = [None]
        directions: tuple[bool, ...] = ()
        if not task.easy:
            batch = replace(batch, mels=self.augmenter(batch.mels, batch.lengths))
            time = batch.mels.shape[1] // self.model.config.encoder.subsampling_rate
            chunk_sizes = [random_chunk(time, rng) for _ in range(1 + two_views)]
            directions = (rng.random() < self.objective.reverse_weight,)
        parts, _, _ = losses(self.model, batch.to(self.device), self.objective, chunk_sizes, directions)
        return parts, frames

    def add(self, task: Task, gradients: list[Tensor]) -> Outcome:
        """Write the gradient of a task to `gradients`, in the order of the parameters."""
        self.model.zero_grad()
        parts, frames = self.losses(task)
        parts.total(self.objective).backward()  # type: ignore[no-untyped-call]
        for gradient, weight in zip(gradients, self.model.parameters(), strict=True):
            if weight.grad is None:
                gradient.zero_()
            else:
                gradient.copy_(weight.grad)
        values = {
            name: float("nan") if (part := getattr(parts, name)) is None else float(part.detach()) for name in LOGGED
        }
        return Outcome(**values, num_frames=frames)


def serve(source: GradientSource, gradients: list[Tensor], pieces: Sequence[Tensor], requests: Connection) -> None:
    """Run the loop of a helper process. A request is a task, numbers of pieces to orthogonalize, or None to end."""
    torch.set_num_threads(1)
    while (request := requests.recv()) is not None:
        if isinstance(request, Task):
            requests.send(source.add(request, gradients))
        else:
            orthogonalize([pieces[number] for number in request])
            requests.send(None)


def shares(pieces: Sequence[Tensor], count: int) -> list[list[int]]:
    """Distribute the numbers of pieces to `count` shares of about equal work."""
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for number in sorted(range(len(pieces)), key=lambda number: -work(pieces[number])):
        lightest = loads.index(min(loads))
        parts[lightest].append(number)
        loads[lightest] += work(pieces[number])
    return parts


class GradientPool:
    """This process and the helper processes forked from it, for one epoch.

    The processes share the weights of the network and the optimizer's `pieces`.
    """

    def __init__(self, source: GradientSource, num_processes: int, pieces: Sequence[Tensor]) -> None:
        self.source = source
        self.shares = shares(pieces, num_processes)
        self.sums = [torch.empty(weight.shape, device=weight.device) for weight in source.model.parameters()]
        self.own = [torch.empty_like(weight) for weight in source.model.parameters()]
        self.helpers: list[tuple[Connection, list[Tensor], multiprocessing.process.BaseProcess]] = []
        if num_processes > 1:
            source.model.share_memory()
            for piece in pieces:
                piece.share_memory_()  # type: ignore[no-untyped-call]
        context = multiprocessing.get_context("fork")
        for _ in range(num_processes - 1):
            gradients = [torch.empty_like(weight) for weight in source.model.parameters()]
            for gradient in gradients:
                gradient.share_memory_()  # type: ignore[no-untyped-call]
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(source, gradients, pieces, theirs), daemon=True)
            process.start()
            self.helpers.append((ours, gradients, process))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for requests, _, process in self.helpers:
            requests.send(None)
            process.join()

    def step(self, tasks: Sequence[Task]) -> tuple[list[Tensor], list[Outcome]]:
        """Return the mean gradient of some tasks in float32, summed in the order of the tasks, and their outcomes."""
        outcomes: list[Outcome] = []
        for total in self.sums:
            total.zero_()
        while len(outcomes) < len(tasks):
            share = tasks[len(outcomes) : len(outcomes) + 1 + len(self.helpers)]
            busy = self.helpers[: len(share) - 1]
            for (requests, _, _), task in zip(busy, share[1:], strict=True):
                requests.send(task)
            outcomes.append(self.source.add(share[0], self.own))
            self._sum(self.own, len(tasks))
            for requests, gradients, _ in busy:
                outcomes.append(requests.recv())
                self._sum(gradients, len(tasks))
        return self.sums, outcomes

    def orthogonalize(self, pieces: Sequence[Tensor]) -> None:
        """Make the matrices in the pool's pieces orthogonal, in place."""
        own, *others = self.shares
        for (requests, _, _), share in zip(self.helpers, others, strict=True):
            requests.send(share)
        orthogonalize([pieces[number] for number in own])
        for requests, _, _ in self.helpers:
            requests.recv()

    def _sum(self, gradients: list[Tensor], num_tasks: int) -> None:
        for total, gradient in zip(self.sums, gradients, strict=True):
            total.add_(gradient, alpha=1 / num_tasks)
