"""Trains the demo model step by step until it is stopped; `--resume` continues exactly where it stopped.

It reads the output of `prepare.py` and looks for more at the start of every epoch. `--decay-steps` ends a run: the
learning rate falls to zero over that many steps.
"""

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import checkpoints
import torch
import yaml
from augment import Augmenter
from batches import Item, Tokenizer
from corpus import NUM_MELS, TARGETS
from data import Data
from gradients import GradientPool, GradientSource, Outcome, Task
from network import add_head, lower_precision, narrow_front
from objective import Objective
from optimizers import Optimizer
from progress import Options, Progress
from reports import Clock, Log, Report, bring_logs
from validation import validate

from u2moe.benchmarks.instruments.host import cpu_fields, processor
from u2moe.export.model import SpeechModel
from u2moe.export.training_config import parse_training_config

EASY_UNTIL = 2.5
"""CTC loss at which a run changes from easy clips to all clips."""


def set_statistics(model: SpeechModel, statistics: dict[str, Any]) -> None:
    """Set the encoder's statistics of the features (global_cmvn)."""
    if model.encoder.global_cmvn is None:
        raise ValueError("this recipe normalizes its features")
    mean = torch.tensor(statistics["mean_stat"], dtype=torch.double) / statistics["frame_num"]
    variance = torch.tensor(statistics["var_stat"], dtype=torch.double) / statistics["frame_num"] - mean**2
    model.encoder.global_cmvn.mean.copy_(mean)
    model.encoder.global_cmvn.istd.copy_(variance.clamp(min=1e-20).rsqrt())


class Trainer:
    """A network in training, its optimizer and its progress."""

    def __init__(self, config: dict[str, Any], statistics: dict[str, Any], options: Options, device: str) -> None:
        self.options, self.schedule, self.statistics = options, options.schedule, statistics
        torch.manual_seed(options.seed)
        self.model = SpeechModel(parse_training_config(config).architecture)
        set_statistics(self.model, statistics)
        narrow_front(self.model, options.channels)
        if options.teacher_weight:
            add_head(self.model, TARGETS.width)
        self.model.to(device)
        self.optimizer = Optimizer(self.model, options.averaged_from)
        lower_precision(self.model)
        self.optimizer.write(self.optimizer.masters)
        self.model.train()
        self.progress = Progress()

    def step(self, pool: GradientPool, batches: list[list[Item]]) -> tuple[list[Outcome], float]:
        """Take one step on some batches. Return their outcomes and the norm of the gradient."""
        progress = self.progress
        rate = self.schedule.rate(progress.step)
        tasks = [
            Task(number=progress.batches + index, items=items, easy=progress.easy)
            for index, items in enumerate(batches)
        ]
        gradients, outcomes = pool.step(tasks)
        norm = self.optimizer.step(gradients, rate, progress.step, pool.orthogonalize)
        progress.step += 1
        progress.batches += len(tasks)
        progress.position += len(tasks)
        progress.speech_seconds += sum(outcome.num_frames for outcome in outcomes) / 100
        mean = sum(outcome.ctc for outcome in outcomes) / len(outcomes)
        progress.ctc += (mean - progress.ctc) / min(progress.step, 50) if math.isfinite(mean) else 0.0
        return outcomes, norm

    def next_epoch(self) -> None:
        """Begin the next epoch. Once the easy clips are learnt, it uses clips of all kinds."""
        progress = self.progress
        progress.easy = progress.easy and progress.ctc > EASY_UNTIL
        progress.epoch += 1
        progress.position = 0

    def state(self) -> dict[str, Any]:
        """Return everything that `load` needs."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "options": asdict(self.options),
            "statistics": self.statistics,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])


class Session:
    """Training from the start of the program to its end."""

    def __init__(self, trainer: Trainer, data: Data, folder: Path, args: argparse.Namespace) -> None:
        self.trainer, self.data, self.folder, self.args = trainer, data, folder, args
        self.log = Log(folder)
        model_conf = yaml.safe_load((folder / "train.yaml").read_text(encoding="utf-8"))["model_conf"]
        self.objective = Objective.of(model_conf, trainer.options.channels, trainer.options.teacher_weight)
        self.deadline = time.monotonic() + 60 * args.minutes
        self.save_clock, self.validate_clock = Clock(args.save_every), Clock(args.validate_every)
        self.stopped = False

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        """Handle a signal: end the run after this step, and save it."""
        self.stopped = True

    def finished(self) -> bool:
        """Return whether it is time to stop."""
        end, step = self.trainer.schedule.end, self.trainer.progress.step
        over = end is not None and step >= end
        return self.stopped or over or time.monotonic() > self.deadline or step >= self.args.until_step

    def run(self) -> None:
        """Train epoch by epoch until it is time to stop."""
        while not self.finished():
            corpus = self.data.corpus(self.trainer.progress)
            progress = self.trainer.progress
            place = f"epoch {progress.epoch} from batch {progress.position}"
            self.log(f"{place}: {corpus.hours:.1f} h in {len(corpus.names)} packs")
            augmenter = Augmenter(self.data.noise, self.trainer.options.augment)
            source = GradientSource(
                self.trainer.model,
                corpus,
                augmenter,
                self.objective,
                seed=self.trainer.options.seed,
                device=self.args.device,
                two_views=self.trainer.options.views == 2,
            )
            with GradientPool(source, self.args.processes, self.trainer.optimizer.muon.pieces) as pool:
                self._epoch(pool, self.data.epoch(corpus, progress))
        self.save()
        if self.trainer.schedule.decay_from is not None or self.validate_clock.due():
            self.validate()

    def _epoch(self, pool: GradientPool, batches: list[list[Item]]) -> None:
        trainer, report = self.trainer, Report()
        before = time.monotonic()
        for step_batches in in_groups(batches, trainer.options.num_batches):
            if self.finished():
                return
            report.add(*trainer.step(pool, step_batches))
            now = time.monotonic()
            trainer.progress.seconds += now - before
            before = now
            if len(report.norms) == self.args.report_steps:
                self.log(f"{self._place()} lr {trainer.schedule.rate(trainer.progress.step):.2e} {report}")
                report = Report()
            if self.save_clock.due():
                self.save()
            if self.validate_clock.due():
                self.validate()
                before = time.monotonic()
                report = Report()
            if trainer.progress.easy and trainer.progress.step > 50 and trainer.progress.ctc <= EASY_UNTIL:
                break
        trainer.next_epoch()

    def _place(self) -> str:
        progress = self.trainer.progress
        return f"{progress.seconds / 3600:7.3f} h step {progress.step} heard {progress.speech_seconds / 3600:.1f} h"

    def save(self) -> None:
        """Write a checkpoint."""
        checkpoints.save(self.trainer.state(), self.folder, self.trainer.progress.step)

    def validate(self) -> None:
        """Score the averaged weights or, while the learning rate falls, the weights themselves."""
        optimizer = self.trainer.optimizer
        decaying = self.trainer.schedule.decay_from is not None
        optimizer.write(optimizer.masters if decaying else optimizer.average)
        for name, corpus in self.data.validation.items():
            for score in validate(
                self.trainer.model, corpus, self.data.tokenizer, self.objective, self.trainer.options.batch_frames
            ):
                self.log.score(self.trainer.progress, name, score)
        optimizer.write(optimizer.masters)


def in_groups(batches: list[list[Item]], size: int) -> Iterator[list[list[Item]]]:
    """Yield the batches in groups of `size`. An incomplete last group is omitted."""
    for start in range(0, len(batches) - size + 1, size):
        yield batches[start : start + size]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("dense.yaml"))
    parser.add_argument("--name", default="dense", help="folder for checkpoints and log, inside the work directory")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this many minutes")
    parser.add_argument("--until-step", type=int, default=1 << 60, help="stop at this step")
    parser.add_argument("--save-every", type=float, default=5, help="minutes between checkpoints")
    parser.add_argument("--validate-every", type=float, default=15, help="minutes between validations")
    parser.add_argument("--report-steps", type=int, default=50, help="steps between lines of the log")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the batches of a step")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint of this name")
    parser.add_argument("--start", type=Path, help="continue from this checkpoint, exact or compact, under a new name")
    parser.add_argument("--model", type=Path, help="WeNet directory with the weights, for a checkpoint without them")
    for name, kind, text in (
        ("lr", float, "peak learning rate"),
        ("decay-steps", int, "decay the learning rate to zero in this many steps, then stop"),
        ("batch-frames", int, "padded frames per batch and view"),
        ("num-batches", int, "batches per step"),
        ("augment", float, "share of the utterances under new conditions"),
        ("views", int, "2: each utterance under two conditions at once, see objective.py"),
        ("teacher-weight", float, "weight of the distance from a teacher, see teacher.py; 0: none"),
        ("averaged-from", int, "first step to average"),
        ("seed", int, "seed of all random numbers"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=f"{text} (default: as before, or {Options.__name__})")
    return parser.parse_args(arguments)


def chosen_options(args: argparse.Namespace, state: dict[str, Any] | None) -> Options:
    """Return the options of a checkpoint, or the defaults, with the changes on the command line."""
    options = Options(**state["options"]) if state else Options()
    names = (
        "lr",
        "decay_steps",
        "batch_frames",
        "num_batches",
        "augment",
        "views",
        "teacher_weight",
        "averaged_from",
        "seed",
    )
    options = replace(options, **{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    if args.decay_steps and options.decay_from is None:
        options = replace(options, decay_from=state["progress"]["step"] if state else 0)
    return options


def filled_config(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a configuration of the recipe, completed with the sizes of the features and of the vocabulary."""
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    size = len(tokenizer.units)
    return config | {"input_dim": NUM_MELS, "output_dim": size, "vocab_size": size}


def prepared_folder(args: argparse.Namespace, data: Data, state: dict[str, Any] | None) -> Path:
    """Write `train.yaml` and `global_cmvn` to the run's folder, and return the folder."""
    folder: Path = args.work_dir / args.name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "train.yaml").exists():
        config = filled_config(args.config, data.tokenizer)
        (folder / "train.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    if not (folder / "global_cmvn").exists():
        if state:
            statistics = state["statistics"]
        else:
            augmenter = Augmenter(data.noise, data.options.augment)
            statistics = data.statistics(data.corpus(Progress()), augmenter)
        (folder / "global_cmvn").write_text(json.dumps(statistics), encoding="utf-8")
    return folder


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    torch.set_num_threads(1)
    path = args.start
    earlier = checkpoints.all_of(args.work_dir / args.name)
    if earlier and not args.resume:
        raise SystemExit(f"{earlier[-1]} exists: use --resume to continue from it, or another --name")
    path = earlier[-1] if earlier else path
    state = checkpoints.load(path, args.model) if path else None
    options = chosen_options(args, state)
    data = Data(args.work_dir, options)
    folder = prepared_folder(args, data, state)
    if path:
        bring_logs(path, folder)
    config = yaml.safe_load((folder / "train.yaml").read_text(encoding="utf-8"))
    statistics = json.loads((folder / "global_cmvn").read_text(encoding="utf-8"))
    trainer = Trainer(config, statistics, options, args.device)
    if state:
        trainer.load(state)
    session = Session(trainer, data, folder, args)
    count = sum(weight.numel() for weight in trainer.model.parameters()) / 1e6
    session.log(f"{time.strftime('%F %T')} {count:.2f} M parameters; {options}")
    machine = f"{processor(cpu_fields())}, {os.cpu_count()} cores, torch {torch.__version__}"
    start = f"from step {trainer.progress.step} of {path.name}" if path else "from scratch"
    session.log(f"{start}; {machine}, {args.device}, {args.processes} processes")
    before = signal.signal(signal.SIGTERM, session.stop)
    try:
        session.run()
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
