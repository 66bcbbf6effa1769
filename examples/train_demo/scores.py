"""Scores networks on the validation sets of a run, in the form that `wenet.py` would write.

A network is a checkpoint of a run, exact or compact, or a WeNet directory. The set `queen-dev` is for decisions; the
test sets are not scored here.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import checkpoints
import torch
import yaml
from batches import Corpus, Tokenizer
from network import lower_precision
from objective import Objective
from progress import Options
from torch import Tensor
from train import filled_config, set_statistics
from validation import Score, validate
from withheld import VALIDATION

from u2moe.export.model import SpeechModel
from u2moe.export.training_config import parse_training_config

DENSE = Path(__file__).with_name("dense.yaml")


@dataclass(frozen=True, kw_only=True)
class Network:
    """The weights of a network, its configuration, and the statistics of its features."""

    config: dict[str, Any]
    statistics: dict[str, Any]
    weights: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path, tokenizer: Tokenizer) -> Self:
        """Read a WeNet directory or a checkpoint. For a checkpoint, see `finished_weights`."""
        folder = path if path.is_dir() else path.parent
        own = folder / "train.yaml"
        config = yaml.safe_load(own.read_text("utf-8")) if own.exists() else filled_config(DENSE, tokenizer)
        if path.is_dir():
            weights = checkpoints.weights_of(path)
            statistics = yaml.safe_load((path / "global_cmvn").read_text(encoding="utf-8"))
            return cls(config=config, statistics=statistics, weights=weights)
        state = checkpoints.load(path)
        return cls(config=config, statistics=state["statistics"], weights=checkpoints.finished_weights(state))

    def model(self) -> SpeechModel:
        """Return the network in the precision of training."""
        model = SpeechModel(parse_training_config(self.config).architecture)
        set_statistics(model, self.statistics)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(self.weights[name])
        lower_precision(model)
        return model

    def scores(self, corpus: Corpus, tokenizer: Tokenizer) -> Iterator[Score]:
        """Yield the scores on a set with each context."""
        options = Options()
        objective = Objective.of(self.config["model_conf"], options.channels)
        yield from validate(self.model(), corpus, tokenizer, objective, options.batch_frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", type=Path, nargs="+", help="checkpoints, or WeNet directories")
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--sets", nargs="+", default=VALIDATION, help="packs of features")
    parser.add_argument("--first", type=int, help="number of utterances of each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer(args.work_dir)
    sizes = None if args.first is None else dict.fromkeys(args.sets, args.first)
    for path in args.networks:
        network = Network.read(path, tokenizer)
        for name in args.sets:
            corpus = Corpus([args.work_dir / "features" / name], tokenizer, sizes=sizes)
            for score in network.scores(corpus, tokenizer):
                print(f"{path}: {name} {score}", flush=True)


if __name__ == "__main__":
    main()
