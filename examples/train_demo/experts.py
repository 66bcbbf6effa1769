"""Which experts a checkpoint uses on the test sets: share of the choices by layer and expert, as JSON."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from u2moe.export import Checkpoint
from u2moe.export.moe import MixtureOfExperts
from u2moe.runtime.audio import read_audio
from u2moe.runtime.corpus.word_errors import read_manifest
from u2moe.runtime.features import fbank


@torch.inference_mode()
def usage(checkpoint: Checkpoint, recordings: list[Path]) -> dict[str, list[float]]:
    """Share of the chosen experts in every encoder layer, over all frames of the recordings."""
    model = checkpoint.network()
    layers = {name: layer for name, layer in model.encoder.named_modules() if isinstance(layer, MixtureOfExperts)}
    counts = {name: torch.zeros(len(layer.experts), dtype=torch.long) for name, layer in layers.items()}

    def count(name: str) -> Any:
        def hook(layer: MixtureOfExperts, inputs: tuple[Tensor, ...]) -> None:
            experts, _ = layer.route(inputs[0].flatten(0, 1))
            counts[name] += torch.bincount(experts.flatten(), minlength=len(counts[name]))

        return hook

    for name, layer in layers.items():
        layer.register_forward_pre_hook(count(name))
    for path in recordings:
        samples = read_audio(path, checkpoint.features.sample_rate)
        frames = torch.from_numpy(fbank(samples, checkpoint.features))
        model.encoder(frames.unsqueeze(0), torch.tensor([len(frames)]))
    return {name: [round(share, 4) for share in (count / count.sum()).tolist()] for name, count in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).with_name("checkpoint"))
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    args = parser.parse_args()
    manifests = sorted((args.work_dir / "test").glob("*.tsv"))
    recordings = [recording.path for manifest in manifests for recording in read_manifest(manifest)]
    shares = usage(Checkpoint.open(args.checkpoint), recordings)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "experts.json").write_text(json.dumps(shares, indent=1) + "\n", encoding="utf-8")
    for name, layer in shares.items():
        print(f"{name:40s} {' '.join(f'{share:6.1%}' for share in layer)}")


if __name__ == "__main__":
    main()
