"""Measures the specialisation of experts: the information of their choice about phone, speaker and band, as JSON.

Actors whom training has not heard speak in three bands: as recorded, over a telephone, and dull. For each layer of the
encoder, the result is the mutual information in bits between the choice of an expert and phone, speaker and band. A
choice among eight has at most three bits. The chance level beside it uses the labels of another recording. The phones
of each expert are reported for the layer with the most information about phones.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experts import Choices
from games import table_rows
from numpy.typing import NDArray
from phones import PHONES, SAMPLE_RATE, Aligner

from u2moe.benchmarks.results.files import write_json
from u2moe.export import Checkpoint
from u2moe.runtime.audio.arrays import Samples
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.model.features import fbank

BANDS: dict[str, tuple[float, float] | None] = {"as recorded": None, "telephone": (300, 3400), "dull": (60, 2000)}
"""Lowest and highest frequency of each band in Hz. None: all frequencies."""
LABELS = ("phone", "speaker", "band")

Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Heard:
    """The choices of experts in one recording, and the labels of its frames."""

    experts: dict[str, NDArray[np.int64]]
    """Chosen experts of each layer [frames, chosen]."""
    labels: dict[str, NDArray[np.int64]]
    """Phone, speaker and band of each frame, as numbers [frames]."""


def in_band(samples: Samples, band: tuple[float, float] | None) -> Samples:
    """Return the samples [time] at 16 kHz without frequencies outside the band."""
    if band is None:
        return samples
    spectrum, frequencies = np.fft.rfft(samples), np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    spectrum[(frequencies < band[0]) | (frequencies > band[1])] = 0
    return np.fft.irfft(spectrum, len(samples)).astype(np.float32)


@torch.inference_mode()
def listen(checkpoint: Checkpoint, manifest: Path, game: str) -> Iterator[Heard]:
    """Yield the choices of the encoder for each recording of a game that can be aligned, in each band."""
    model, aligner = checkpoint.network(), Aligner()
    who = {row["clip"].partition(".")[0]: row["speaker_group"] for row in table_rows(game, "test")}
    choices, names = Choices(model), sorted(set(who.values()))
    encoder = model.config.encoder
    for recording in read_recordings(manifest):
        samples = read_audio(recording.path, SAMPLE_RATE)
        phones = aligner.phones(samples, recording.transcript)
        if phones is None:
            continue
        for number, band in enumerate(BANDS.values()):
            frames = torch.from_numpy(fbank(in_band(samples, band), checkpoint.features))
            model.encoder(frames.unsqueeze(0), torch.tensor([len(frames)]))
            experts = {name: chosen.numpy() for name, chosen in choices.last.items() if name.startswith("encoder.")}
            count = len(next(iter(experts.values())))
            first = (encoder.right_context + 1) // 2 + 1  # the middle of the frame's features, whose windows last 25 ms
            middles = [min(first + encoder.subsampling_rate * frame, len(phones) - 1) for frame in range(count)]
            labels = {
                "phone": np.array([PHONES.index(phones[middle]) for middle in middles]),
                "speaker": np.full(count, names.index(who[recording.path.stem])),
                "band": np.full(count, number),
            }
            yield Heard(experts=experts, labels=labels)


def counts(experts: NDArray[np.int64], labels: NDArray[np.int64], num_experts: int, num_labels: int) -> Counts:
    """Count how often each expert was chosen for each label [experts, labels]. `experts` are [frames, chosen]."""
    result = np.zeros((num_experts, num_labels), np.int64)
    np.add.at(result, (experts, labels[:, None]), 1)
    return result


def information(table: Counts) -> float:
    """Return the mutual information of the rows and columns of a table of counts, in bits."""
    shares = table / table.sum()
    even = shares.sum(1, keepdims=True) * shares.sum(0, keepdims=True)
    inside = shares > 0
    return float((shares[inside] * np.log2(shares[inside] / even[inside])).sum())


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Counts of the choices of a layer's experts for each label [experts, labels]."""

    own: Counts
    chance: Counts
    """Counts with the labels of another recording."""

    def bits(self) -> dict[str, float]:
        """Return the information in the choices about the labels, and that by chance, in bits."""
        return {"bits": round(information(self.own), 4), "chance": round(information(self.chance), 4)}


def tables_of(heard: list[Heard], layer: str, label: str) -> Tables:
    """Return the counts of a layer. For chance, each recording gets the previous one's labels, cut or repeated."""
    num_experts = 1 + max(int(item.experts[layer].max()) for item in heard)
    num_labels = 1 + max(int(item.labels[label].max()) for item in heard)
    own, chance = (np.zeros((num_experts, num_labels), np.int64) for _ in range(2))
    for item, other in zip(heard, [heard[-1], *heard[:-1]], strict=True):
        experts = item.experts[layer]
        own += counts(experts, item.labels[label], num_experts, num_labels)
        chance += counts(experts, np.resize(other.labels[label], len(experts)), num_experts, num_labels)
    return Tables(own=own, chance=chance)


def report(heard: list[Heard]) -> dict[str, Any]:
    """Return the bits about every label in each layer, and the phones of each expert in the best layer."""
    heard = random.Random(1).sample(heard, len(heard))  # so that the previous recording is a random one
    tables = {layer: {label: tables_of(heard, layer, label) for label in LABELS} for layer in heard[0].experts}
    layers = {layer: {label: table.bits() for label, table in own.items()} for layer, own in tables.items()}
    best = max(layers, key=lambda layer: layers[layer]["phone"]["bits"])
    chosen = tables[best]["phone"].own
    shares = chosen / np.maximum(chosen.sum(0), 1)
    phones = {name: [round(share, 4) for share in own.tolist()] for name, own in zip(PHONES, shares.T, strict=False)}
    return {
        "num_recordings": len(heard) // len(BANDS),
        "num_frames": sum(len(item.labels["band"]) for item in heard),
        "layers": layers,
        "best": {"layer": best, "phones": phones},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).with_name("checkpoint"))
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    args = parser.parse_args()
    manifest = args.work_dir / "test" / "queen-test.tsv"
    found = report(list(listen(Checkpoint.open(args.checkpoint), manifest, "queen")))
    write_json(args.output / "specialists.json", found)
    for layer, bits in found["layers"].items():
        print(f"{layer:45s}", *(f"{label} {own['bits']:.3f} ({own['chance']:.3f})" for label, own in bits.items()))


if __name__ == "__main__":
    main()
