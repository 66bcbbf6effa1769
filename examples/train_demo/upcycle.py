"""Turns a dense checkpoint of this recipe into a mixture of experts with the same output (sparse upcycling).

Every feed-forward layer is cut into as many parts as experts are chosen for a token, and every part is copied into
several experts. Experts from one copy share a row of the new router. The two best experts of a token are therefore
always the parts of one copy, at equal weights. With doubled outputs, their sum is the dense layer (arXiv 2410.07524:
virtual groups). The rows come from clusters of the tokens that the dense layer sees. A little noise separates the
experts; training does the rest. So a mixture and its dense twin start from one point, with the same work for every
token.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import checkpoints
import torch
import yaml
from augment import Augmenter
from clusters import TokenRecord, router_rows
from data import Data
from gradients import GradientSource, Task
from objective import Objective
from progress import Options, Progress
from torch import Tensor
from train import Trainer

from u2moe.export.moe import DenseFeedForward

NUM_EXPERTS, NUM_CHOSEN = 8, 2
NUM_UTTERANCES = 400
"""Number of utterances from which the tokens of the dense layers are taken. They run one at a time, without padding."""


def mixture_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a dense network's configuration with experts. Chosen experts are together as wide as a dense layer."""
    experts = {"mlp_type": "moe", "n_expert": NUM_EXPERTS, "n_expert_activated": NUM_CHOSEN}
    return config | {
        part: config[part] | experts | {"linear_units": config[part]["linear_units"] // NUM_CHOSEN}
        for part in ("encoder_conf", "decoder_conf")
    }


def upcycled(
    weights: dict[str, Tensor], rows: Mapping[str, Tensor], noise: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the weights of a mixture of experts, made from the weights of a dense network.

    `rows` has the router [copies, dim] of every feed-forward layer. `noise` is relative to the size of each matrix.
    """
    result: dict[str, Tensor] = {}
    for name, weight in weights.items():
        layer, _, part = name.partition(".w_1.")
        if ".w_2." in name:
            continue
        if not part:
            result[name] = weight
        elif part == "weight":
            result |= experts(layer, weights, rows[layer], noise, generator)
    return result


def experts(
    layer: str, weights: dict[str, Tensor], rows: Tensor, noise: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the router and the experts made from one feed-forward layer. `rows` are [copies, dim]."""
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


def clustered_rows(
    state: dict[str, Any], config: dict[str, Any], work_dir: Path, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return a router [copies, dim] for every feed-forward layer, from the layer's inputs in the dense network."""
    options = Options(**state["options"])
    trainer = Trainer(config, state["statistics"], options, "cpu")
    trainer.load(state)
    data = Data(work_dir, options)
    corpus = data.corpus(Progress())
    objective = Objective.of(config["model_conf"], options.channels)
    augmenter = Augmenter(data.noise, options.augment)
    source = GradientSource(trainer.model, corpus, augmenter, objective, seed=options.seed, device="cpu")
    layers = [(name, layer) for name, layer in trainer.model.named_modules() if isinstance(layer, DenseFeedForward)]
    with TokenRecord(layers) as record, torch.inference_mode():
        for number, items in enumerate(data.epoch(corpus, Progress(easy=False))[:NUM_UTTERANCES]):
            source.losses(Task(number=number, items=items[:1], easy=False))
    num_rows = NUM_EXPERTS // NUM_CHOSEN
    return {name: router_rows(record.tokens(name, generator), num_rows, generator) for name, _ in layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint of the dense network, exact or compact")
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--dense", default="dense", help="folder of the dense run")
    parser.add_argument("--name", default="mixture", help="folder of the new run, for train.py --resume")
    parser.add_argument("--noise", type=float, default=0.05, help="noise on the experts, relative to their weights")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    state = checkpoints.load(args.checkpoint)
    folder = args.work_dir / args.name
    folder.mkdir(parents=True)
    config = yaml.safe_load((args.work_dir / args.dense / "train.yaml").read_text(encoding="utf-8"))
    (folder / "train.yaml").write_text(yaml.safe_dump(mixture_config(config), sort_keys=False), encoding="utf-8")
    generator = torch.Generator().manual_seed(args.seed)
    rows = clustered_rows(state, config, args.work_dir, generator)
    masters = upcycled(state["optimizer"]["masters"], rows, args.noise, generator)
    state["options"]["restart"] = state["progress"]["step"]
    state["optimizer"] = {"masters": masters, "average": masters, "parts": None}
    path = checkpoints.save(state, folder, state["progress"]["step"])
    print(f"{path}: {sum(weight.numel() for weight in masters.values()) / 1e6:.2f} M parameters")


if __name__ == "__main__":
    main()
