"""Which experts a checkpoint uses on the test sets: share of the choices by layer and expert, as JSON.

Decoders are given the transcripts. With `--least 2` it is an error if an expert takes less than 2 % of the choices.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from batches import Tokenizer
from torch import Tensor

from u2moe.benchmarks.results.files import write_json
from u2moe.export import Checkpoint
from u2moe.export.moe import MixtureOfExperts
from u2moe.runtime.audio import read_audio
from u2moe.runtime.corpus.word_errors import Recording, read_manifest
from u2moe.runtime.features import fbank


@torch.inference_mode()
def usage(checkpoint: Checkpoint, tokenizer: Tokenizer, recordings: list[Recording]) -> dict[str, list[float]]:
    """Share of the chosen experts in every layer, over all frames and tokens of the recordings."""
    model = checkpoint.network()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MixtureOfExperts)}
    counts = {name: torch.zeros(len(layer.experts), dtype=torch.long) for name, layer in layers.items()}

    def count(name: str) -> Any:
        def hook(layer: MixtureOfExperts, inputs: tuple[Tensor, ...]) -> None:
            experts, _ = layer.route(inputs[0].flatten(0, 1))
            counts[name] += torch.bincount(experts.flatten(), minlength=len(counts[name]))

        return hook

    for name, layer in layers.items():
        layer.register_forward_pre_hook(count(name))
    for recording in recordings:
        samples = read_audio(recording.path, checkpoint.features.sample_rate)
        frames = torch.from_numpy(fbank(samples, checkpoint.features))
        encoder_out, lengths = model.encoder(frames.unsqueeze(0), torch.tensor([len(frames)]))
        tokens = torch.tensor([tokenizer.encode(recording.transcript)])
        model.score(tokens, torch.tensor([tokens.shape[1]]), encoder_out, lengths)
    return {name: [round(share, 4) for share in (count / count.sum()).tolist()] for name, count in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).with_name("checkpoint"))
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--least", type=float, default=0.0, help="percent of the choices that every expert must take")
    args = parser.parse_args()
    manifests = sorted((args.work_dir / "test").glob("*.tsv"))
    recordings = [recording for manifest in manifests for recording in read_manifest(manifest)]
    shares = usage(Checkpoint.open(args.checkpoint), Tokenizer(args.checkpoint), recordings)
    write_json(args.output / "experts.json", shares)
    for name, layer in shares.items():
        print(f"{name:45s} {' '.join(f'{share:6.1%}' for share in layer)}")
    rare = [
        f"{name} {expert}"
        for name, own in shares.items()
        for expert, share in enumerate(own)
        if share < args.least / 100
    ]
    if rare:
        sys.exit(f"experts with less than {args.least:g} % of the choices: {', '.join(rare)}")


if __name__ == "__main__":
    main()
