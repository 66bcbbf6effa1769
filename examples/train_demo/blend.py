"""Mixes a mixture of experts with the average of the dense run that it forked from: the last step to a finished model.

The average over many steps at a high rate understands unseen speakers better than weights at the end of a decay, which
fit the training data more closely (README, decisions); the mixture has what the experts have learnt. Both lie in one
valley, so that a point between them is better than either. The dense network takes part as copies under the mixture's
routers, which computes the same as the dense network itself.
"""

import argparse
from pathlib import Path

import checkpoints
import torch
import yaml
from torch import Tensor
from upcycle import NUM_CHOSEN, upcycled

GATE = ".gate.weight"


def copies(dense: dict[str, Tensor], mixture: dict[str, Tensor]) -> dict[str, Tensor]:
    """A dense network in the form of a mixture, under the means of the mixture's pairs of router rows.

    Beside another dense network it stays as it is.
    """
    rows = {
        name.removesuffix(GATE): weight.float().view(-1, NUM_CHOSEN, weight.shape[1]).mean(1)
        for name, weight in mixture.items()
        if name.endswith(GATE)
    }
    return upcycled(dense, rows, 0.0, torch.Generator()) if rows else dense


def blended(dense: dict[str, Tensor], mixture: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The weights of a mixture, `share` of the way from the dense network to it."""
    start = copies(dense, mixture)
    return {name: torch.lerp(start[name].float(), weight.float(), share) for name, weight in mixture.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense", type=Path, help="checkpoint of the dense run, whose average is taken")
    parser.add_argument("mixture", type=Path, help="checkpoint of the mixture, at the end of its decay")
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--name", default="blend", help="folder of the result")
    parser.add_argument(
        "--share", type=float, required=True, help="0: the dense network, 1: the mixture; chosen on dev"
    )
    args = parser.parse_args()
    dense, mixture = (checkpoints.load(path) for path in (args.dense, args.mixture))
    weights = blended(dense["optimizer"]["average"], mixture["optimizer"]["masters"], args.share)
    folder = args.work_dir / args.name
    folder.mkdir(parents=True)
    config = yaml.safe_load((args.mixture.parent / "train.yaml").read_text(encoding="utf-8"))
    (folder / "train.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    mixture["optimizer"] = {"masters": weights, "average": weights, "parts": None}
    print(checkpoints.save(mixture, folder, mixture["progress"]["step"]))


if __name__ == "__main__":
    main()
