"""Makes test sets of real people and of held-out synthetic voices: 16 kHz FLAC files and a TSV of `path<TAB>text`.

They are never used for training. Texts come from the packages: file names, scripts and transcriptions. The set in `dev`
is for calibration.
"""

import argparse
import gzip
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from corpus import SAMPLE_RATE, SPEECH, Pack, to_float
from games import read_lines
from numpy.typing import NDArray
from spelling import normalize

Samples = NDArray[np.float32]
Item = tuple[str, Samples, str]

SAYTIME_WORDS = {"oclock": "o'clock", "am": "a m", "pm": "p m", "the_time_is": "the time is"}
POCKETSPHINX_COMMANDS = {"goforward": "go forward ten meters", "something": "go somewhere and do something"}
ASTERISK_WORDS = {"digits", "letters", "phonetic"}
ASTERISK_SPELLING = {
    "digits/h-40": "fortieth",
    "letters/exclaimation-point": "exclamation point",
    "phonetic/x_p": "x-ray",
    "unidentified-no-callback": "unidentified or withheld and therefore cannot be called back",
}
"""Corrections to the texts in the package's list."""
ASTERISK_UNCLEAR = {
    "conf-adminmenu-menu8", "demo-instruct", "demo-moreinfo", "queue-periodic-announce", "spy-dahdi", "spy-h323",
    "spy-iax", "spy-iax2", "spy-mgcp", "spy-sip", "spy-unistim", "spy-zap", "vm-INBOX",
}  # fmt: skip
"""Clips whose words differ from the list."""


def decoded(path: Path, *options: str) -> Samples:
    """Decode a recording of any format to 16 kHz mono."""
    output = ["-f", "s16le", "-ac", "1", "-ar", str(SAMPLE_RATE), "-"]
    pcm = subprocess.check_output(["ffmpeg", "-v", "error", *options, "-i", str(path), *output])
    return to_float(np.frombuffer(pcm, "<i2"))


def queen(debian: Path) -> Iterator[Item]:
    """Yield clips of game characters that training does not use."""
    for line in read_lines("queen", "test", debian):
        yield line.clip.removesuffix(".SB"), line.wideband, line.text


def asterisk(debian: Path, *, words: bool) -> Iterator[Item]:
    """Yield recordings of the telephone voice: isolated words and letters, or sentences, from the package's list."""
    listing = gzip.decompress((debian / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz").read_bytes())
    for line in listing.decode("utf-8", errors="replace").splitlines():
        name, separator, text = line.partition(":")
        path = debian / f"usr/share/asterisk/sounds/en_US_f_Allison/{name}.g722"
        text = ASTERISK_SPELLING.get(name, re.sub(r"\[.\]", "", text).replace("PBX", "P B X").replace("IVR", "I V R"))
        if separator and path.exists() and name not in ASTERISK_UNCLEAR and not re.search(r"[<\[(#*@]", text):
            isolated = name.split("/")[0] in ASTERISK_WORDS
            if isolated is words:
                yield name.replace("/", "-"), decoded(path), text


def saytime(debian: Path) -> Iterator[Item]:
    """Yield numbers and time words of the talking clock."""
    for path in sorted((debian / "usr/share/saytime").glob("*.au")):
        yield path.stem, decoded(path, *au_options(path)), SAYTIME_WORDS.get(path.stem, path.stem)


def au_options(path: Path) -> list[str]:
    """Return the decoder options for a file. Files without a header are 8 kHz mu-law."""
    return [] if path.read_bytes()[:4] == b".snd" else ["-f", "mulaw", "-ar", "8000"]


def pocketsphinx(debian: Path) -> Iterator[Item]:
    """Yield sentences of an audio book, playing cards, and commands to a robot."""
    folder = debian / "usr/share/pocketsphinx/test/data"
    for listing in (folder / "librivox/transcription", folder / "cards/cards.transcription"):
        for line in listing.read_text(encoding="utf-8").splitlines():
            found = re.fullmatch(r"<s> (.*) </s> \((.*)\)", line.strip())
            if found:
                yield f"{listing.parent.name}-{found[2]}", decoded(listing.parent / f"{found[2]}.wav"), found[1]
    for name, text in POCKETSPHINX_COMMANDS.items():
        yield name, decoded(folder / f"{name}.raw", "-f", "s16le", "-ar", "16000"), text


def packed(work_dir: Path, name: str) -> Iterator[Item]:
    """Yield the content of a pack of speech that is not used for training."""
    pack = Pack(work_dir / "speech" / name, SPEECH)
    rows = pack.map()
    for number, entry in enumerate(pack.utterances):
        samples = to_float(rows[entry.offset : entry.offset + entry.length])
        yield f"{entry.voice}-{number:03d}", samples, entry.text


def write(folder: Path, name: str, items: Iterator[Item]) -> str:
    """Write the files of one set and its manifest. Return a line for the terminal."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines, seconds = [], 0.0
    for stem, samples, text in items:
        path = folder / name / f"{stem}.flac"
        soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
        lines.append(f"{path.relative_to(folder)}\t{normalize(text)}\n")
        seconds += len(samples) / SAMPLE_RATE
    (folder / f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
    words = sum(len(line.partition("\t")[2].split()) for line in lines)
    return f"{name}: {len(lines)} utterances, {words} words, {seconds / 60:.1f} min"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--debian", type=Path, required=True, help="folder with the unpacked Debian packages")
    args = parser.parse_args()
    sets = {
        "queen-test": queen(args.debian),
        "asterisk-words": asterisk(args.debian, words=True),
        "asterisk-sentences": asterisk(args.debian, words=False),
        "saytime": saytime(args.debian),
        "pocketsphinx": pocketsphinx(args.debian),
        "heldout": packed(args.work_dir, "heldout"),
    }
    for name, items in sets.items():
        print(write(args.work_dir / "test", name, items), flush=True)
    print(write(args.work_dir / "dev", "queen-dev", packed(args.work_dir, "queen-dev")), flush=True)


if __name__ == "__main__":
    main()
