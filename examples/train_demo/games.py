"""Acted dialogue of freeware games: a table of clips and texts (`queen.tsv.xz` and others), and readers of the clips.

As a script it decodes the training and validation clips into packs of speech; run it again to resume.
"""

import argparse
import io
import lzma
from collections.abc import Callable, Iterator
from csv import QUOTE_NONE, DictReader
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rnc
import soundfile
from corpus import SPEECH, Pack, resample, to_pcm
from numpy.typing import NDArray
from spelling import normalize

Samples = NDArray[np.float32]

TABLES = Path(__file__).parent
MAX_CER = 0.5
"""Character error rate of a recogniser above which a clip is not used: it contains a laugh, a cry or other words."""
PCM_RATE = 11025
SKY_HEADER_LEN = 22


@dataclass(frozen=True, kw_only=True)
class Line:
    """A clip, its speaker, and its normalized text."""

    clip: str
    voice: str
    text: str
    samples: Samples
    """Samples [time] in [-1, 1] at `rate` Hz."""
    rate: int

    @property
    def wideband(self) -> Samples:
        """Samples at the rate of the packs."""
        return resample(self.samples, self.rate)


def from_mp3(data: bytes) -> tuple[Samples, int]:
    """Decode a clip of Flight of the Amazon Queen: an MP3 file."""
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    return samples, rate


def from_pcm(data: bytes) -> tuple[Samples, int]:
    """Decode a clip of Drascula: unsigned bytes."""
    return np.asarray((np.frombuffer(data, "u1").astype(np.float32) - 128) / 128, np.float32), PCM_RATE


def from_sky(data: bytes) -> tuple[Samples, int]:
    """Decode a clip of Beneath a Steel Sky: a header, then unsigned bytes, which are compressed in most clips."""
    body = data[SKY_HEADER_LEN:]
    return from_pcm(rnc.unpack(body) if body.startswith(rnc.SIGNATURE) else body)


@dataclass(frozen=True)
class Game:
    """Place of a game's speech among the unpacked Debian packages, and decoder of its clips."""

    folder: str
    file: str
    """Name of the file with the speech. If each clip has its own file, it contains the name of the clip."""
    decode: Callable[[bytes], tuple[Samples, int]]


GAMES = {
    "queen": Game("flight-of-the-amazon-queen", "queen.1c", from_mp3),
    "sky": Game("beneath-a-steel-sky", "sky.dsk", from_sky),
    "drascula": Game("drascula/en", "{clip}.ALS", from_pcm),
}


def table_rows(game: str, split: str) -> list[dict[str, str]]:
    """Return the rows of a game's table that belong to one split."""
    with lzma.open(TABLES / f"{game}.tsv.xz", "rt", encoding="utf-8") as file:
        return [row for row in DictReader(file, delimiter="\t", quoting=QUOTE_NONE) if row["split"] == split]


def read_lines(game: str, split: str, debian: Path, start: int = 0) -> Iterator[Line]:
    """Yield the clips of a split, from number `start` on, whose recordings agree with the script."""
    place = GAMES[game]
    folder = debian / "usr/share/scummvm" / place.folder
    rows = [row for row in table_rows(game, split) if float(row["cer"]) < MAX_CER and normalize(row["text"])]
    for row in rows[start:]:
        with (folder / place.file.format(clip=row["clip"])).open("rb") as file:
            file.seek(int(row["offset"]))
            samples, rate = place.decode(file.read(int(row["size"])))
        voice, text = f"{game}-{row['speaker_group']}", normalize(row["text"])
        yield Line(clip=row["clip"], voice=voice, text=text, samples=samples, rate=rate)


def read_game(game: str, split: str, debian: Path, folder: Path) -> str:
    """Decode a game's clips of one split into a pack. Return a line for the terminal."""
    with Pack(folder / f"{game}-{split}", SPEECH) as pack:
        for line in read_lines(game, split, debian, start=len(pack.utterances)):
            pack.append(to_pcm(line.wideband), line.voice, line.text)
        return f"{game}-{split}: {len(pack.utterances)} clips"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--debian", type=Path, required=True, help="folder with the unpacked Debian packages")
    args = parser.parse_args()
    for game in GAMES:
        for split in ("train", "dev"):
            print(read_game(game, split, args.debian, args.work_dir / "speech"), flush=True)


if __name__ == "__main__":
    main()
