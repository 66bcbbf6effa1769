"""Turns a dense checkpoint of this recipe into a mixture of experts that computes the same (sparse upcycling).

Every feed-forward layer is cut into as many parts as experts are chosen for a token, and every part is copied into
several experts. Experts that are parts of one copy share a row of the new router, so the two best of a token are always
the parts of one copy, at equal weights: with their outputs doubled their sum is the dense layer (arXiv 2410.07524 calls
it virtual groups). A little noise on the experts sets them apart; training does the rest. So a mixture and its dense
twin start from one point, with the same work for every token.
"""

import argparse
from pathlib import Path
from typing import Any

import checkpoints
import torch
import yaml
from torch import Tensor

NUM_EXPERTS, NUM_CHOSEN = 8, 2
ROUTER_SCALE = 0.02


def mixture_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a dense network, with experts that are together as wide as its layers."""
    experts = {"mlp_type": "moe", "n_expert": NUM_EXPERTS, "n_expert_activated": NUM_CHOSEN}
    return config | {
        part: config[part] | experts | {"linear_units": config[part]["linear_units"] // NUM_CHOSEN}
        for part in ("encoder_conf", "decoder_conf")
    }


def upcycled(weights: dict[str, Tensor], noise: float, seed: int) -> dict[str, Tensor]:
    """The weights of a mixture of experts, out of those of a dense network; `noise` is relative to each matrix."""
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Tensor] = {}
    for name, weight in weights.items():
        layer, _, part = name.partition(".w_1.")
        if ".w_2." in name:
            continue
        if not part:
            result[name] = weight
        elif part == "weight":
            result |= experts(layer, weights, noise, generator)
    return result


def experts(layer: str, weights: dict[str, Tensor], noise: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Router and experts of one feed-forward layer."""
    dim = weights[f"{layer}.w_1.weight"].shape[1]
    rows = torch.randn(NUM_EXPERTS // NUM_CHOSEN, dim, generator=generator) * ROUTER_SCALE
    result = {f"{layer}.gate.weight": rows.repeat_interleave(NUM_CHOSEN, 0)}
    halves = [weights[f"{layer}.{name}"].chunk(NUM_CHOSEN) for name in ("w_1.weight", "w_1.bias")]
    columns = (NUM_CHOSEN * weights[f"{layer}.w_2.weight"]).chunk(NUM_CHOSEN, 1)

    def noisy(weight: Tensor) -> Tensor:
        return weight + noise * weight.std() * torch.randn(weight.shape, generator=generator)

    for number in range(NUM_EXPERTS):
        part, expert = number % NUM_CHOSEN, f"{layer}.experts.{number}"
        result[f"{expert}.w_1.weight"] = noisy(halves[0][part])
        result[f"{expert}.w_1.bias"] = halves[1][part].clone()
        result[f"{expert}.w_2.weight"] = noisy(columns[part])
        result[f"{expert}.w_2.bias"] = weights[f"{layer}.w_2.bias"].clone()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="of the dense network, exact or compact")
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--dense", default="dense", help="folder of the dense run")
    parser.add_argument("--name", default="mixture", help="folder of the new run, which train.py --resume goes on with")
    parser.add_argument("--noise", type=float, default=0.05, help="on the experts, relative to their weights")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    state = checkpoints.load(args.checkpoint)
    folder = args.work_dir / args.name
    folder.mkdir(parents=True)
    config = yaml.safe_load((args.work_dir / args.dense / "train.yaml").read_text(encoding="utf-8"))
    (folder / "train.yaml").write_text(yaml.safe_dump(mixture_config(config), sort_keys=False), encoding="utf-8")
    masters = upcycled(state["optimizer"]["masters"], args.noise, args.seed)
    state["options"]["restart"] = state["progress"]["step"]
    state["optimizer"] = {"masters": masters, "average": masters, "parts": None}
    path = checkpoints.save(state, folder, state["progress"]["step"])
    print(f"{path}: {sum(weight.numel() for weight in masters.values()) / 1e6:.2f} M parameters")


if __name__ == "__main__":
    main()
