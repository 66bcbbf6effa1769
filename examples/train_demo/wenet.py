"""Writes the weights of a run as a checkpoint directory that WeNet and `u2moe export` read, in float16."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import torch
import yaml
from train import set_statistics

from u2moe.export.model import SpeechModel
from u2moe.export.training_config import parse_training_config

EXACT = ("encoder.global_cmvn.mean", "encoder.global_cmvn.istd")
"""Statistics of the features, which stay exact. They are few, and their inverse deviations scale all features."""


def network(state: dict[str, Any], config: dict[str, Any]) -> SpeechModel:
    """Return the network of a checkpoint."""
    model = SpeechModel(parse_training_config(config).architecture)
    set_statistics(model, state["statistics"])
    with torch.no_grad():
        weights = checkpoints.finished_weights(state)
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--name", default="dense", help="folder of the run, inside the work directory")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint of that run, exact or compact (default: its last)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("checkpoint"))
    args = parser.parse_args()
    folder = args.work_dir / args.name
    path = args.checkpoint or checkpoints.all_of(folder)[-1]
    state = checkpoints.load(path)
    config = yaml.safe_load((folder / "train.yaml").read_text(encoding="utf-8"))
    model = network(state, config)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in ("units.txt", "bpe.model"):
        shutil.copyfile(args.work_dir / name, args.output / name)
    shutil.copyfile(folder / "train.yaml", args.output / "train.yaml")
    (args.output / "global_cmvn").write_text(json.dumps(state["statistics"]), encoding="utf-8")
    weights = {
        name: (value.float() if name in EXACT else value.half()).contiguous()
        for name, value in model.state_dict().items()
    }
    torch.save(weights, args.output / "final.pt")
    print(
        f"{path} -> {args.output / 'final.pt'}: {sum(value.numel() for value in weights.values()) / 1e6:.2f} M numbers"
    )


if __name__ == "__main__":
    main()
