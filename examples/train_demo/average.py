"""Averages the last checkpoints of a training run into a checkpoint directory as WeNet lays it out, in float16."""

import argparse
import shutil
from pathlib import Path

import torch


def average(paths: list[Path]) -> dict[str, torch.Tensor]:
    """Mean of the weights, tensor by tensor."""
    states = [torch.load(path)["model"] for path in paths]
    return {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--name", default="model", help="folder of the run, inside the work directory")
    parser.add_argument("--num", type=int, default=5, help="checkpoints to average")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("checkpoint"))
    args = parser.parse_args()
    folder = args.work_dir / args.name
    paths = sorted(folder.glob("step_*.pt"))[-args.num :]
    args.output.mkdir(parents=True, exist_ok=True)
    for name in ("train.yaml", "global_cmvn"):
        shutil.copyfile(folder / name, args.output / name)
    for name in ("units.txt", "bpe.model"):
        shutil.copyfile(args.work_dir / name, args.output / name)
    weights = average(paths)
    # the statistics of the features stay exact: they are few, and their inverse deviations scale everything
    exact = {"encoder.global_cmvn.mean", "encoder.global_cmvn.istd"}
    state = {name: (value.float() if name in exact else value.half()).contiguous() for name, value in weights.items()}
    torch.save(state, args.output / "final.pt")
    size = (args.output / "final.pt").stat().st_size
    count = sum(value.numel() for value in state.values())
    print(f"{len(paths)} checkpoints, {count / 1e6:.2f} M numbers, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
