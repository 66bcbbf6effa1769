"""Makes packs of 8-bit log-mels from packs of speech, at other speeds, in rooms and on telephones; and a vocabulary.

Run it again when there is more speech. Noise, gain, band limits and masks are not applied here: `augment` draws them
for every batch.
"""

import argparse
import io
import random
import subprocess
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import sentencepiece
import soundfile
from corpus import FRAGMENTS, MELS, NUM_MELS, SAMPLE_RATE, SPEECH, Pack, resample, to_bytes, to_float, to_pcm
from games import GAMES
from manners import REVOICED
from numpy.typing import NDArray
from scipy.signal import fftconvolve
from spelling import normalize
from texts import Sentences, Sources

from u2moe.runtime.bundle.manifest import FeatureConfig
from u2moe.runtime.model.features import fbank

FEATURES = FeatureConfig(sample_rate=SAMPLE_RATE, num_mel_bins=NUM_MELS)
SHORTEST = SAMPLE_RATE // 8
NUM_PIECES = 320
NUM_SENTENCES = 100_000
NUM_SILENCES = 500
CODECS = (
    ("WAV", "ULAW", 8000),
    ("WAV", "ULAW", 8000),
    ("WAV", "ULAW", 8000),
    ("WAV", "GSM610", 8000),
    ("WAV", "GSM610", 8000),
    ("AU", "G721_32", 8000),
    ("OGG", "OPUS", 8000),
    ("OGG", "OPUS", 16000),
)
"""Container, codec and sample rate of each kind of coding. Opus has 10 to 20 kbit/s."""
UNCHANGED = (1, 0.0)
PLANS = {
    **{f"{game}-train": (5, 0.12) for game in GAMES},
    **{f"{game}-dev": UNCHANGED for game in GAMES},
    "urquan-train": (3, 0.12),
    "heldout": UNCHANGED,
    "noise": UNCHANGED,
    "silence": UNCHANGED,
}
"""Number of variants of each utterance, and variation of their speed, by the name of the pack."""
KINDS = {REVOICED: (1, 0.05), FRAGMENTS: (2, 0.12)}
"""Number of variants and variation of speed, by the end of the pack's name."""
BLANKET_SOUNDS = "/com/rafaelmardojai/Blanket/sounds"


def reverberated(samples: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the speech in a random room. Its response is an impulse, then exponentially decaying noise.

    The noise is louder at a greater distance.
    """
    decay = rng.uniform(0.1, 0.6) * SAMPLE_RATE
    tail = rng.standard_normal(int(0.7 * decay)) * np.exp(-6.9 * np.arange(int(0.7 * decay)) / decay)
    tail[: int(rng.uniform(0.001, 0.01) * SAMPLE_RATE)] = 0
    loudness = rng.uniform(0.2, 0.9) if rng.random() < 0.75 else rng.uniform(0.9, 2.5)
    tail *= loudness / np.sqrt(np.sum(tail**2))
    tail[0] = 1
    return np.asarray(fftconvolve(samples, tail)[: len(samples)], np.float32)


def coded(samples: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the speech coded as for a telephone or for a small file, at a random level and sometimes clipped."""
    container, codec, rate = CODECS[rng.integers(len(CODECS))]
    narrow = resample(samples, SAMPLE_RATE, rate)
    level = rng.uniform(0.05, 1.0) if rng.random() < 0.8 else rng.uniform(1.5, 4.0)
    narrow = np.clip(narrow * (level / max(np.abs(narrow).max(), 1e-5)), -1, 1)
    file = io.BytesIO()
    compression = rng.uniform(0.93, 1) if container == "OGG" else None
    soundfile.write(file, narrow, rate, format=container, subtype=codec, compression_level=compression)
    file.seek(0)
    decoded, _ = soundfile.read(file, dtype="float32", frames=len(narrow))
    return resample(decoded, rate, SAMPLE_RATE)


def variant(samples: NDArray[np.float32], spread: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the speech at a random speed, which also changes the pitch.

    One in three variants is in a random room, and one in six goes through a codec.
    """
    speed = round(40 * rng.uniform(1 - spread, 1 + spread))
    samples = resample(samples, speed, 40)
    samples = reverberated(samples, rng) if rng.random() < 0.33 else samples
    return coded(samples, rng) if rng.random() < 0.17 else samples


def plan(name: str) -> tuple[int, float]:
    """Return the number of variants of each utterance in a pack, and the variation of their speed."""
    by_kind = next((value for end, value in KINDS.items() if name.endswith(end)), (1, 0.16))
    return PLANS.get(name, by_kind)


def extract(speech_path: Path, folder: Path, copies: int, spread: float) -> str:
    """Extract features of `copies` variants of each utterance in a pack. Continue where an earlier call stopped.

    The utterances are unchanged if `spread` is 0.
    """
    speech = Pack(speech_path, SPEECH)
    utterances = [utterance for utterance in speech.utterances if utterance.length > SHORTEST]
    samples = speech.map()
    with Pack(folder / speech_path.stem, MELS) as mels:
        for number in range(len(mels.utterances), copies * len(utterances)):
            utterance = utterances[number // copies]
            clip = to_float(samples[utterance.offset : utterance.offset + utterance.length])
            if spread:
                clip = variant(clip, spread, np.random.default_rng(number))
            mels.append(to_bytes(fbank(clip, FEATURES)), utterance.voice, utterance.text)
        return f"{speech_path.stem}: {len(mels.utterances)} utterances, {mels.num_rows / 360_000:.2f} h"


def read_noises(blanket: Path, music: Path, folder: Path) -> None:
    """Write background sounds and music to the pack `noise`, cut into pieces of 20 s."""
    command = ["gresource", "list", str(blanket), BLANKET_SOUNDS]
    names = [name for name in subprocess.check_output(command, text=True).split() if name.endswith(".ogg")]
    tracks = [subprocess.check_output(["gresource", "extract", str(blanket), name]) for name in names]
    command = ["ffmpeg", "-v", "error", "-i", "-", "-f", "s16le", "-ac", "1", "-ar", str(SAMPLE_RATE), "-"]
    tracks = [subprocess.run(command, input=track, capture_output=True, check=True).stdout for track in tracks]
    for path in sorted(music.glob("*.g722")):
        tracks.append(subprocess.check_output([*command[:4], str(path), *command[5:]])[: 2 * 120 * SAMPLE_RATE])
    pieces: list[NDArray[np.int16]] = []
    for track in tracks:
        pieces += np.array_split(np.frombuffer(track, "<i2"), 1 + len(track) // (2 * 20 * SAMPLE_RATE))
    with Pack(folder / "noise", SPEECH) as pack:
        for piece in pieces[len(pack.utterances) :]:
            peak = max(1, int(np.abs(piece.astype(np.int32)).max()))
            pack.append(piece.astype(np.float32) * (16000 / peak), "noise", "-")


def cut_silence(noise: Pack, folder: Path) -> None:
    """Write pieces of noise and of hiss to the pack `silence`, as clips without speech."""
    samples = noise.map()
    with Pack(folder / "silence", SPEECH) as pack:
        for number in range(len(pack.utterances), NUM_SILENCES):
            rng = np.random.default_rng(number)
            length = int(rng.uniform(1, 8) * SAMPLE_RATE)
            start = rng.integers(len(samples) - length)
            piece = samples[start : start + length] / 32768
            hiss = rng.standard_normal(length) * 10 ** rng.uniform(-4.5, -2)
            piece = piece * 10 ** rng.uniform(-2, 0) * (rng.random() < 0.7) + hiss
            pack.append(to_pcm(piece.astype(np.float32)), f"silence-{number}", "")


def write_vocabulary(texts: Iterable[str], folder: Path, num_pieces: int = NUM_PIECES) -> None:
    """Write `bpe.model` and `units.txt` in WeNet's present layout."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "bpe"), model_type="bpe", vocab_size=num_pieces,
        character_coverage=1.0, bos_id=-1, eos_id=-1, minloglevel=1,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "bpe.model"))
    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    units = ["<blank>", "<unk>", "<sos/eos>", *(piece for piece in pieces if piece != "<unk>")]
    lines = (f"{unit} {index}\n" for index, unit in enumerate(units))
    (folder / "units.txt").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--debian", type=Path, required=True, help="folder with the unpacked Debian packages")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--packs", nargs="*", help="only these")
    args = parser.parse_args()
    speech, features = args.work_dir / "speech", args.work_dir / "features"

    def wanted(name: str) -> bool:
        return not args.packs or name in args.packs

    if wanted("noise"):
        read_noises(args.debian / "usr/share/blanket/blanket.gresource", args.debian / "usr/share/asterisk/moh", speech)
    if wanted("silence"):
        cut_silence(Pack(speech / "noise", SPEECH), speech)
    if not (args.work_dir / "units.txt").exists():
        sentences, rng = Sentences(Sources(debian=args.debian)), random.Random(0)
        write_vocabulary((normalize(sentences.draw(rng)) for _ in range(NUM_SENTENCES)), args.work_dir)
    packs = [path.with_suffix("") for path in sorted(speech.glob("*.tsv")) if wanted(path.stem) and path.stat().st_size]
    with ProcessPoolExecutor(args.processes) as pool:
        jobs = [pool.submit(extract, path, features, *plan(path.name)) for path in packs]
        for job in jobs:
            print(job.result(), flush=True)


if __name__ == "__main__":
    main()
