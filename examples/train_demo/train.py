"""Trains the demo model for a given number of minutes; every few minutes it saves, and with `--resume` it goes on.

The learning rate follows the time spent, and so does the noise on the routers.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from augment import Augmenter
from batches import Batch, Corpus, Tokenizer
from corpus import MEL_FLOOR, MEL_STEP, MELS, NUM_MELS, Pack
from muon import Muon, muon_weights
from torch import Tensor, nn

from u2moe.export.decoder import AttentionDecoder
from u2moe.export.model import SpeechModel
from u2moe.export.moe import DenseFeedForward, MixtureOfExperts
from u2moe.export.training_config import parse_training_config
from u2moe.runtime.corpus.word_errors import WordErrors

WARMUP_STEPS = 250
REPORT_STEPS = 50
MAX_CHUNK = 25
ROW_GRID = 64
ROUTER_NOISE, NOISE_ENDS = 1.0, 0.4
"""Relative noise on the routers, which fades until this share of the time."""
EASY_VOICES, EASY_FRAMES = ("hibari", "pico-us"), 250
VALIDATION = ("queen-dev", "heldout")


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The parts of the training loss, each per token."""

    ctc: Tensor
    left: Tensor
    right: Tensor

    def total(self, conf: dict[str, float]) -> Tensor:
        """U2++: CTC, and both directions of attention."""
        reverse = conf["reverse_weight"]
        attention = (1 - reverse) * self.left + reverse * self.right
        return conf["ctc_weight"] * self.ctc + (1 - conf["ctc_weight"]) * attention


def random_chunk(num_frames: int) -> int | None:
    """WeNet's dynamic chunk: full context half of the time, else 1 to 25 encoder frames."""
    chunk = random.randint(1, max(num_frames - 1, 1))
    return None if chunk > num_frames // 2 else chunk % MAX_CHUNK + 1


def losses(model: SpeechModel, batch: Batch, chunk_size: int | None, smoothing: float) -> Losses:
    """The losses of a batch whose encoder sees `chunk_size` frames at once (None: everything)."""
    config = model.config
    encoder_out, times = model.encoder(batch.mels, batch.lengths, chunk_size)
    log_probs = torch.log_softmax(model.ctc.ctc_lo(encoder_out).float(), dim=-1).transpose(0, 1)
    num_tokens = batch.token_lengths.sum()
    ctc = nn.functional.ctc_loss(
        log_probs, batch.tokens.clamp(min=0), times, batch.token_lengths, config.blank, "sum", zero_infinity=True
    )

    steps = torch.arange(batch.tokens.shape[1])
    inside = steps < batch.token_lengths.unsqueeze(1)
    mirror = torch.where(inside, batch.token_lengths.unsqueeze(1) - 1 - steps, steps)

    def attention(decoder: AttentionDecoder, tokens: Tensor) -> Tensor:
        start = tokens.new_full((len(tokens), 1), config.sos)
        inputs = torch.cat((start, tokens.masked_fill(~inside, config.eos)), 1)
        targets = torch.cat((tokens, tokens.new_full((len(tokens), 1), -1)), 1)
        targets.scatter_(1, batch.token_lengths.unsqueeze(1), config.eos)
        logits = decoder(inputs, batch.token_lengths + 1, encoder_out, times).float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum", label_smoothing=smoothing
        )
        return loss / (num_tokens + len(tokens))

    right_decoder = model.right_decoder
    if right_decoder is None:
        raise ValueError("this recipe trains both directions")
    return Losses(
        ctc=ctc / num_tokens,
        left=attention(model.left_decoder, batch.tokens),
        right=attention(right_decoder, batch.tokens.gather(1, mirror)),
    )


def greedy(log_probs: Tensor, blank: int) -> list[int]:
    """Tokens of the best path [time, vocab]: repeats merged, blanks dropped."""
    best = torch.unique_consecutive(log_probs.argmax(-1)).tolist()
    return [token for token in best if token != blank]


@torch.inference_mode()
def validate(model: SpeechModel, corpus: Corpus, tokenizer: Tokenizer, chunk_size: int | None, num_frames: int) -> str:
    """Losses and greedy word error rate, as a line for the log."""
    model.eval()
    errors, sums, count = WordErrors(), torch.zeros(3), 0
    for batch in corpus.in_order(num_frames):
        with torch.autocast("cpu", torch.bfloat16):
            parts = losses(model, batch, chunk_size, 0.0)
            encoder_out, times = model.encoder(batch.mels, batch.lengths, chunk_size)
            log_probs = model.ctc.ctc_lo(encoder_out)
        sums += torch.stack((parts.ctc, parts.left, parts.right)) * len(batch.texts)
        count += len(batch.texts)
        for row, time_, text in zip(log_probs, times.tolist(), batch.texts, strict=True):
            errors.add(text, tokenizer.decode(greedy(row[:time_], model.config.blank)))
    model.train()
    ctc, left, right = (sums / count).tolist()
    return f"chunk {chunk_size or 'all'}: ctc {ctc:.3f} left {left:.3f} right {right:.3f} WER {errors.rate:.1%}"


def feature_statistics(corpus: Corpus, augmenter: Augmenter, num_frames: int) -> dict[str, Any]:
    """WeNet's global_cmvn, from 60 augmented batches."""
    total, square, count = torch.zeros(NUM_MELS, dtype=torch.double), torch.zeros(NUM_MELS, dtype=torch.double), 0
    for _, batch in zip(range(60), corpus.epoch(num_frames, random.Random(0)), strict=False):
        mels = augmenter(batch.mels, batch.lengths)
        frames = mels[torch.arange(mels.shape[1]) < batch.lengths.unsqueeze(1)].double()
        total, square, count = total + frames.sum(0), square + (frames**2).sum(0), count + len(frames)
    return {"mean_stat": total.tolist(), "var_stat": square.tolist(), "frame_num": count}


def set_statistics(model: SpeechModel, statistics: dict[str, Any]) -> None:
    """Puts global_cmvn into the encoder."""
    if model.encoder.global_cmvn is None:
        raise ValueError("this recipe normalizes its features")
    mean = torch.tensor(statistics["mean_stat"], dtype=torch.double) / statistics["frame_num"]
    variance = torch.tensor(statistics["var_stat"], dtype=torch.double) / statistics["frame_num"] - mean**2
    model.encoder.global_cmvn.mean.copy_(mean)
    model.encoder.global_cmvn.istd.copy_(variance.clamp(min=1e-20).rsqrt())


def course(
    corpus: Corpus, easy_corpus: Corpus, num_frames: int, seed: int, easy: Callable[[], bool]
) -> Iterator[tuple[Batch, bool]]:
    """Batches, epoch after epoch, and whether they are easy: short ones of few voices, to be heard as they are.

    So CTC finds its alignment soonest; only then do the decoders have something to listen to.
    """
    rng = random.Random(seed)
    while True:
        started_easy = easy()
        if started_easy:
            batches = easy_corpus.epoch(num_frames // 2, rng, longest=EASY_FRAMES)
        else:
            batches = corpus.epoch(num_frames, rng)
        for batch in batches:
            yield batch, started_easy
            if started_easy and not easy():
                break


def round_shapes(model: SpeechModel) -> None:
    """Lets every expert see a multiple of `ROW_GRID` tokens, padding with zeros.

    How many tokens an expert gets changes with every batch, and oneDNN compiles a kernel for each shape that it meets:
    without this two thirds of the time go there.
    """

    def attach(expert: DenseFeedForward) -> None:
        rows = 0

        def pad(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal rows
            rows = len(inputs[0])
            return (nn.functional.pad(inputs[0], (0, 0, 0, -rows % ROW_GRID)),)

        def cut(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output[:rows]

        expert.register_forward_pre_hook(pad)
        expert.register_forward_hook(cut)

    for module in model.modules():
        if isinstance(module, DenseFeedForward):
            attach(module)


def make_optimizers(model: SpeechModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of hidden layers, AdamW for everything else."""
    matrices = muon_weights(model)
    taken = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in taken]
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    return [Muon(matrices, lr=lr, weight_decay=0.05), adam]


class RouterNoise:
    """Random numbers on the logits of every router, so that no expert is forgotten before it has learnt something.

    `scale` is their standard deviation, relative to that of the logits; the trained model knows nothing of them.
    """

    def __init__(self, model: SpeechModel, scale: float) -> None:
        self.scale = scale
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                module.gate.register_forward_hook(self._disturbed)

    def _disturbed(self, router: nn.Module, _: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        return logits + self.scale * logits.detach().std() * torch.randn_like(logits) if router.training else logits


class Log:
    """Lines on the terminal and in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, line: str) -> None:
        """Writes one line."""
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class Report:
    """Mean losses since the last line of the log."""

    def __init__(self) -> None:
        self.sums, self.steps, self.frames, self.since = torch.zeros(4), 0, 0, time.time()

    def add(self, parts: Losses, norm: Tensor, batch: Batch) -> None:
        """Counts one step and the norm of its gradient."""
        self.sums += torch.stack((parts.ctc.detach(), parts.left.detach(), parts.right.detach(), norm))
        self.steps += 1
        self.frames += int(batch.lengths.sum())

    def ctc(self) -> float:
        """Mean CTC loss."""
        return float(self.sums[0]) / self.steps

    def __str__(self) -> str:
        ctc, left, right, norm = (self.sums / self.steps).tolist()
        speed = self.frames / 100 / (time.time() - self.since)
        return f"ctc {ctc:.3f} left {left:.3f} right {right:.3f} grad {norm:.2f} x{speed:.0f}"


class Trainer:
    """A model, its optimizers and how far they have come: `step`, seconds `spent`, and the `ctc` loss reached."""

    def __init__(self, model: SpeechModel, model_conf: dict[str, float], lr: float) -> None:
        self.model, self.model_conf, self.lr = model, model_conf, lr
        round_shapes(model)
        model.encoder.embed.conv.to(memory_format=torch.channels_last)  # twice as fast on CPUs
        self.router_noise = RouterNoise(model, ROUTER_NOISE)
        self.optimizers = make_optimizers(model, lr)
        self.step, self.spent, self.ctc = 0, 0.0, math.inf

    def train(self, batch: Batch, progress: float, *, easy: bool) -> tuple[Losses, Tensor]:
        """One step, after this share of the time: losses and norm of the gradient."""
        self.router_noise.scale = ROUTER_NOISE * max(1 - progress / NOISE_ENDS, 0)
        chunk_size = None if easy else random_chunk(batch.mels.shape[1] // self.model.config.encoder.subsampling_rate)
        with torch.autocast("cpu", torch.bfloat16):
            parts = losses(self.model, batch, chunk_size, self.model_conf["lsm_weight"])
        total = parts.ctc if easy else parts.total(self.model_conf)
        self.model.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        for optimizer in self.optimizers if norm.isfinite() else ():
            optimizer.param_groups[0]["lr"] = self.learning_rate(progress)
            optimizer.step()
        self.step += 1
        return parts, norm

    def learning_rate(self, progress: float) -> float:
        """Warm-up, then a half cosine that ends at zero with the last minute."""
        return self.lr * min((self.step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * progress))

    def save(self, folder: Path) -> None:
        """Writes a checkpoint from which training goes on."""
        path = folder / f"step_{self.step:06d}.pt"
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": (self.step, self.spent, self.ctc),
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)

    def load(self, path: Path) -> None:
        """Goes on from such a checkpoint."""
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.spent, self.ctc = state["progress"]

    def load_weights(self, path: Path) -> None:
        """Starts from the weights of a WeNet checkpoint, past the easy phase."""
        self.model.load_state_dict({name: value.float() for name, value in torch.load(path).items()})
        self.ctc = 0.0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("train.yaml"))
    parser.add_argument("--name", default="model", help="folder for checkpoints and log, inside the work directory")
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--save-every", type=float, default=3, help="minutes between checkpoints")
    parser.add_argument("--validate-every", type=float, default=6, help="minutes between validations")
    parser.add_argument("--batch-frames", type=int, default=12000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--augment", type=float, default=0.6, help="share of the utterances under new conditions")
    parser.add_argument("--min-word-count", type=int, default=3, help="leave out utterances with words rarer than this")
    parser.add_argument("--easy-until", type=float, default=2.5, help="CTC on short, clean speech down to this loss")
    parser.add_argument("--weights", type=Path, help="a final.pt to start from, such as that of `checkpoint/`")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    folder = args.work_dir / args.name
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder / "train.log")
    torch.manual_seed(1)
    random.seed(1)

    tokenizer = Tokenizer(args.work_dir)
    config = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    config |= {"input_dim": NUM_MELS, "output_dim": len(tokenizer.units), "vocab_size": len(tokenizer.units)}
    features = args.work_dir / "features"
    names = sorted(path.stem for path in features.glob("*.mel") if path.stem not in {*VALIDATION, "noise"})
    corpus = Corpus([features / name for name in names], tokenizer, args.min_word_count)
    easy_corpus = Corpus([features / name for name in EASY_VOICES], tokenizer)
    validation = {name: Corpus([features / name], tokenizer) for name in VALIDATION}
    noise = torch.from_numpy(Pack(features / "noise", MELS).map().copy()) * MEL_STEP + MEL_FLOOR
    augmenter = Augmenter(noise, args.augment)

    trainer = Trainer(SpeechModel(parse_training_config(config).architecture), config["model_conf"], args.lr)
    checkpoints = sorted(folder.glob("step_*.pt"))
    if args.resume and checkpoints:
        trainer.load(checkpoints[-1])
    else:
        if args.weights:
            statistics = json.loads(args.weights.with_name("global_cmvn").read_text(encoding="utf-8"))
        else:
            statistics = feature_statistics(corpus, augmenter, args.batch_frames)
        set_statistics(trainer.model, statistics)
        if args.weights:
            trainer.load_weights(args.weights)
        (folder / "global_cmvn").write_text(json.dumps(statistics), encoding="utf-8")
        (folder / "train.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    log(f"{corpus.hours:.1f} h of {', '.join(names)}")
    log(f"{parameters / 1e6:.2f} M parameters; from step {trainer.step}, {trainer.spent:.0f} s")

    def validate_all(title: str) -> None:
        for name, part in validation.items():
            for size in (None, 16):
                log(f"{title:6} {name} {validate(trainer.model, part, tokenizer, size, args.batch_frames)}")

    trainer.model.train()
    start = time.time() - trainer.spent
    saved = validated = time.time()
    report = Report()
    batches = course(
        corpus, easy_corpus, args.batch_frames, seed=trainer.step, easy=lambda: trainer.ctc > args.easy_until
    )
    for batch, easy in batches:
        progress = trainer.spent / (60 * args.minutes)
        if progress >= 1:
            break
        heard = batch if easy else replace(batch, mels=augmenter(batch.mels, batch.lengths))
        report.add(*trainer.train(heard, progress, easy=easy), batch)
        trainer.spent = time.time() - start
        if report.steps == REPORT_STEPS:
            trainer.ctc = report.ctc() if easy else min(report.ctc(), trainer.ctc)
            log(f"{trainer.spent / 60:6.1f} min step {trainer.step} lr {trainer.learning_rate(progress):.2e} {report}")
            report = Report()
        if time.time() - saved > 60 * args.save_every:
            trainer.save(folder)
            saved = time.time()
        if time.time() - validated > 60 * args.validate_every:
            validate_all("")
            validated = time.time()
            report = Report()
    trainer.save(folder)
    validate_all("final")


if __name__ == "__main__":
    main()
