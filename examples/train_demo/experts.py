"""Measures which experts a checkpoint uses on the test sets: share of the choices by layer and expert, as JSON.

Decoders receive the transcripts. With `--least 2` it is an error if an expert takes less than 2 % of the choices.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from batches import Tokenizer
from torch import Tensor

from u2moe.benchmarks.results.files import write_json
from u2moe.export import Checkpoint
from u2moe.export.model import SpeechModel
from u2moe.export.moe import MixtureOfExperts
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.model.features import fbank


class Choices:
    """Records the experts [tokens, chosen] that each layer of a network chose in its last call, by layer name."""

    def __init__(self, model: SpeechModel) -> None:
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MixtureOfExperts)}
        self.last: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            layer.register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[MixtureOfExperts, tuple[Tensor, ...]], None]:
        def remember(layer: MixtureOfExperts, inputs: tuple[Tensor, ...]) -> None:
            self.last[name], _ = layer.route(inputs[0].flatten(0, 1))

        return remember


@torch.inference_mode()
def usage(checkpoint: Checkpoint, tokenizer: Tokenizer, recordings: list[Recording]) -> dict[str, list[float]]:
    """Return the share of each expert in the choices of its layer, over all frames and tokens of the recordings."""
    model = checkpoint.network()
    choices = Choices(model)
    counts = {name: torch.zeros(len(layer.experts), dtype=torch.long) for name, layer in choices.layers.items()}
    for recording in recordings:
        samples = read_audio(recording.path, checkpoint.features.sample_rate)
        frames = torch.from_numpy(fbank(samples, checkpoint.features))
        encoder_out, lengths = model.encoder(frames.unsqueeze(0), torch.tensor([len(frames)]))
        tokens = torch.tensor([tokenizer.encode(recording.transcript)])
        model.score(tokens, torch.tensor([tokens.shape[1]]), encoder_out, lengths)
        for name, chosen in choices.last.items():
            counts[name] += torch.bincount(chosen.flatten(), minlength=len(counts[name]))
    return {name: [round(share, 4) for share in (count / count.sum()).tolist()] for name, count in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).with_name("checkpoint"))
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--least", type=float, default=0.0, help="percent of the choices that every expert must take")
    args = parser.parse_args()
    manifests = sorted((args.work_dir / "test").glob("*.tsv"))
    recordings = [recording for manifest in manifests for recording in read_recordings(manifest)]
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
