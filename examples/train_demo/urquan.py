"""Acted dialogue of The Ur-Quan Masters: 27 voices, 11 hours, cut into the lines of the script.

Texts and times are in the packages of the game; `urquan.tsv.xz` lists a recogniser's disagreement with each line. As a
script it cuts the agreeing lines into a pack of speech; run it again to resume. With `--hear BUNDLE` it writes the
table instead.
"""

import argparse
import io
import lzma
import re
from collections.abc import Iterator
from csv import DictReader
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import soundfile
from corpus import SAMPLE_RATE, SPEECH, Pack, resample, to_pcm
from numpy.typing import NDArray
from spelling import normalize

from u2moe.runtime import Recognizer
from u2moe.runtime.text.word_errors import edit_distance

Samples = NDArray[np.float32]

TABLE = Path(__file__).with_name("urquan.tsv.xz")
CONTENT = Path("usr/share/games/uqm/content")
TEXTS, VOICES = "packages/uqm-0.8.0-content.uqm", "addons/uqm-0.8.0-voice.uqm"
NAME = "urquan-train"
MAX_CER = 0.6
"""Maximum character error rate of a line. The demo model misunderstands a third of unknown speakers' speech."""
SLACK_S, WINDOW_S = 0.35, 0.04
"""Largest distance of a pause from its stated time, and duration of the pause that must be quiet."""
SHORTEST_S, LONGEST_S = 0.4, 16.0
ASIDE = re.compile(r"\([^)]*\)|\*[^*]*\*")
"""Pattern for text that is not spoken: noises and stage directions."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the script, its speaker, and its samples."""

    clip: str
    number: int
    voice: str
    text: str
    samples: Samples
    """Samples [time] in [-1, 1] at the rate of the packs."""


def sections(text: str) -> dict[str, tuple[str, list[str]]]:
    """Parse sections that begin with `#(KEY) rest`. Return the rest and the non-empty lines of each section, by key."""
    found = re.finditer(r"^#\((\w+)\)[ \t]*([^\n]*)\n?(.*?)(?=^#\(|\Z)", text, re.MULTILINE | re.DOTALL)
    return {match[1]: (match[2].strip(), [line for line in match[3].splitlines() if line.strip()]) for match in found}


def quietest(samples: Samples, start: float) -> int:
    """Return the middle of the quietest moment near `start`, which is in seconds, as a sample number."""
    first = max(int((start - SLACK_S) * SAMPLE_RATE), 0)
    near = samples[first : int((start + SLACK_S) * SAMPLE_RATE)]
    window = int(WINDOW_S * SAMPLE_RATE)
    if len(near) <= window:
        return min(int(start * SAMPLE_RATE), len(samples))
    sums = np.concatenate([[0.0], np.cumsum(np.square(near, dtype=np.float64))])
    return first + int(np.argmin(sums[window:] - sums[:-window])) + window // 2


def cut(samples: Samples, times_ms: list[int], num_lines: int) -> list[Samples]:
    """Return a clip's samples by line. Empty: the game does not specify when the lines begin."""
    if len(times_ms) < num_lines - 1:
        return [samples] if num_lines == 1 else []
    begins = [quietest(samples, time / 1000) for time in accumulate(times_ms[: num_lines - 1])]
    return np.split(samples, begins)


def clips(debian: Path) -> Iterator[tuple[str, str, Samples, list[int], list[str]]]:
    """Yield every clip of the game: speaker, name, samples, durations of its lines in ms, and the lines."""
    with ZipFile(debian / CONTENT / TEXTS) as texts, ZipFile(debian / CONTENT / VOICES) as voices:
        names = set(voices.namelist())
        for voice in sorted({name.split("/")[1] for name in names if name.endswith(".ogg")}):
            folder = f"3dovoice/{voice}"
            times = sections(voices.read(f"{folder}/{voice}.ts").decode("latin-1"))
            # the package of voices has its own script where it differs from the first edition of the game
            own = f"{folder}/{voice}.txt"
            script = voices.read(own) if own in names else texts.read(f"base/comm/{voice}/{voice}.txt")
            for key, (clip, lines) in sections(script.decode("latin-1")).items():
                if f"{folder}/{clip}" in names and lines:
                    samples, rate = soundfile.read(io.BytesIO(voices.read(f"{folder}/{clip}")), dtype="float32")
                    stated = [int(time) for time in times.get(key, ("", []))[0].split(",") if time.strip()]
                    yield voice, clip, resample(samples, rate), stated, lines


def all_lines(debian: Path) -> Iterator[Line]:
    """Yield every spoken line of the script."""
    for voice, clip, samples, times_ms, lines in clips(debian):
        pieces = cut(samples, times_ms, len(lines))
        for number, (piece, text) in enumerate(zip(pieces, lines, strict=bool(pieces))):
            normal = normalize(ASIDE.sub(" ", text))
            if normal and SHORTEST_S < len(piece) / SAMPLE_RATE < LONGEST_S:
                yield Line(clip=clip, number=number, voice=f"urquan-{voice}", text=normal, samples=piece)


def agreed() -> set[tuple[str, int]]:
    """Return the clip and the number of each line that a recogniser hears about as written."""
    with lzma.open(TABLE, "rt", encoding="utf-8") as file:
        rows = DictReader(file, delimiter="\t")
        return {(row["clip"], int(row["line"])) for row in rows if float(row["cer"]) < MAX_CER}


def hear(bundle: Path, debian: Path) -> Iterator[str]:
    """Yield the rows of the table, with a bundle's character error rate for each line."""
    yield "clip\tline\tcer\n"
    recognizer = Recognizer.from_pretrained(bundle, num_threads=1)
    for line in all_lines(debian):
        heard = normalize(recognizer.transcribe(line.samples, SAMPLE_RATE).text)
        yield f"{line.clip}\t{line.number}\t{edit_distance(list(heard), list(line.text)) / len(line.text):.2f}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--debian", type=Path, required=True, help="folder with the unpacked Debian packages")
    parser.add_argument("--hear", type=Path, metavar="BUNDLE", help="write the table, with the texts of this bundle")
    args = parser.parse_args()
    if args.hear:
        TABLE.write_bytes(lzma.compress("".join(hear(args.hear, args.debian)).encode()))
        return
    known = agreed()
    with Pack(args.work_dir / "speech" / NAME, SPEECH) as pack:
        lines = (line for line in all_lines(args.debian) if (line.clip, line.number) in known)
        for number, line in enumerate(lines):
            if number >= len(pack.utterances):
                pack.append(to_pcm(line.samples), line.voice, line.text)
        print(f"{NAME}: {len(pack.utterances)} lines, {pack.num_rows / SAMPLE_RATE / 3600:.2f} h")


if __name__ == "__main__":
    main()
