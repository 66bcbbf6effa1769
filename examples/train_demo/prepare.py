"""Packs of speech -> packs of 8-bit log-mel features with speed and reverberation variants, and the BPE vocabulary.

Noise, gain, band limits and masks are not applied here: `augment` draws them anew for every batch.
"""

import argparse
import io
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import sentencepiece
import soundfile
from corpus import MELS, NUM_MELS, SAMPLE_RATE, SPEECH, Pack, resample, to_bytes, to_pcm
from numpy.typing import NDArray
from scipy.signal import fftconvolve
from texts import normalize, queen_lines

FRAME_LEN, FRAME_SHIFT, FFT_SIZE, LOW_FREQ = 400, 160, 512, 20.0
SHORTEST = SAMPLE_RATE // 8
NUM_PIECES = 320
BLANKET_SOUNDS = "/com/rafaelmardojai/Blanket/sounds"


def mel_of(hertz: NDArray[np.float64] | float) -> NDArray[np.float64]:
    return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)


def mel_filters() -> NDArray[np.float32]:
    """Kaldi's triangular filters: [bins of the power spectrum, mels]."""
    edges = np.linspace(mel_of(LOW_FREQ), mel_of(SAMPLE_RATE / 2), NUM_MELS + 2)
    points = mel_of(np.arange(FFT_SIZE // 2 + 1) * SAMPLE_RATE / FFT_SIZE)[:, None]
    rising = (points - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - points) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


FILTERS = mel_filters()
WINDOW = (np.hanning(FRAME_LEN) ** 0.85).astype(np.float32)


def log_mels(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Kaldi's fbank without dither, all frames at once: [frames, mels]."""
    frames = np.lib.stride_tricks.sliding_window_view(samples * 32768, FRAME_LEN)[::FRAME_SHIFT]
    frames = frames - frames.mean(1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], 1)
    power = np.abs(np.fft.rfft(frames * WINDOW, FFT_SIZE)) ** 2
    return np.log(np.maximum(power @ FILTERS, np.finfo(np.float32).eps)).astype(np.float32)


def reverberated(samples: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """The speech in a random room: an impulse followed by exponentially decaying noise."""
    decay = rng.uniform(0.1, 0.6) * SAMPLE_RATE
    tail = rng.standard_normal(int(0.7 * decay)) * np.exp(-6.9 * np.arange(int(0.7 * decay)) / decay)
    tail[: int(rng.uniform(0.001, 0.01) * SAMPLE_RATE)] = 0
    tail *= rng.uniform(0.2, 0.9) / np.sqrt(np.sum(tail**2))
    tail[0] = 1
    return fftconvolve(samples, tail)[: len(samples)].astype(np.float32)


def variant(samples: NDArray[np.float32], spread: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """The speech at a random speed (and pitch) and, one time in three, in a random room."""
    speed = round(40 * rng.uniform(1 - spread, 1 + spread))
    samples = resample(samples, speed, 40)
    return reverberated(samples, rng) if rng.random() < 0.33 else samples


def extract(speech_path: Path, folder: Path, copies: int, spread: float) -> str:
    """Features of all utterances of a pack, `copies` variants of each (none changed if spread is 0); resumes."""
    speech = Pack(speech_path, SPEECH)
    utterances = [utterance for utterance in speech.utterances if utterance.length > SHORTEST]
    samples = speech.map()
    with Pack(folder / speech_path.stem, MELS) as mels:
        for number in range(len(mels.utterances), copies * len(utterances)):
            utterance = utterances[number // copies]
            clip = samples[utterance.offset : utterance.offset + utterance.length].astype(np.float32) / 32768
            if spread:
                clip = variant(clip, spread, np.random.default_rng(number))
            mels.append(to_bytes(log_mels(clip)), utterance.voice, utterance.text)
        return f"{speech_path.stem}: {len(mels.utterances)} utterances, {mels.num_rows / 360_000:.2f} h"


def read_queen(archive: Path, table: Path, folder: Path, split: str) -> None:
    """Decodes the game's clips of one split whose recording agrees with the script."""
    with archive.open("rb") as file, Pack(folder / f"queen-{split}", SPEECH) as pack:
        rows = [row for row in queen_lines(table, split) if float(row["cer"]) < 0.5 and normalize(row["text"])]
        for row in rows[len(pack.utterances) :]:
            file.seek(int(row["offset"]))
            samples, rate = soundfile.read(io.BytesIO(file.read(int(row["size"]))), dtype="float32")
            pack.append(to_pcm(resample(samples, rate)), f"queen-{row['speaker_group']}", normalize(row["text"]))


def read_noises(blanket: Path, music: Path, folder: Path) -> None:
    """Ambiences and music -> the pack `noise`, cut into pieces of 20 s."""
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


def write_vocabulary(texts: list[str], folder: Path) -> None:
    """`bpe.model` and `units.txt` in WeNet's present layout."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "bpe"), model_type="bpe", vocab_size=NUM_PIECES,
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
    parser.add_argument("--queen-table", type=Path, required=True, help="queen.tsv, the table of game lines")
    parser.add_argument("--debian", type=Path, required=True, help="folder with the unpacked Debian packages")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    speech, features = args.work_dir / "speech", args.work_dir / "features"
    archive = args.debian / "usr/share/scummvm/flight-of-the-amazon-queen/queen.1c"
    for split in ("train", "dev"):
        read_queen(archive, args.queen_table, speech, split)
    read_noises(args.debian / "usr/share/blanket/blanket.gresource", args.debian / "usr/share/asterisk/moh", speech)
    packs = sorted(path.with_suffix("") for path in speech.glob("*.tsv"))
    plans = {"queen-train": (3, 0.12), "queen-dev": (1, 0.0), "heldout": (1, 0.0), "noise": (1, 0.0)}
    with ProcessPoolExecutor(args.processes) as pool:
        jobs = [pool.submit(extract, path, features, *plans.get(path.name, (1, 0.16))) for path in packs]
        for job in jobs:
            print(job.result(), flush=True)
    if not (args.work_dir / "units.txt").exists():
        skipped = {"queen-dev", "heldout", "noise"}
        training = [Pack(features / path.name, MELS) for path in packs if path.name not in skipped]
        write_vocabulary([utterance.text for pack in training for utterance in pack.utterances], args.work_dir)


if __name__ == "__main__":
    main()
