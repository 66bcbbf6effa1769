"""Makes the human recordings of the demo model from the test sets, and states their origin.

With `--understood` it lists candidate sentences: those that `evaluate.py` found to be recognised without an error.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from corpus import SAMPLE_RATE

from u2moe.benchmarks.results.files import read_json

GAP_S = 0.1
ASTERISK = "Allison Smith, Asterisk core sounds, CC-BY-SA-3.0; words joined from digits/"
GAME = (
    "MODIFIED (one line of speech, as 16 kHz FLAC) from Flight of the Amazon Queen, "
    "(C) John Passfield and Steven Stamatiadis, freeware"
)
CLIPS = {
    "phone_number": (
        [f"asterisk-words/digits-{digit}" for digit in "735216"],
        "SEVEN THREE FIVE TWO ONE SIX",
        ASTERISK,
    ),
    "command": (["queen-test/49002AP2"], "NOW GET BACK TO WORK", GAME),
    "question": (["queen-test/050001P2"], "WHAT DO YOU WANT TO KNOW", GAME),
}
"""Parts, transcript and origin of every clip."""
SHORTEST = 5
"""Minimum number of words of a candidate sentence."""


def understood(heard: Path) -> Iterator[str]:
    """Yield the sentences that the int8 bundle recognises without errors in all contexts and passes, longest first."""
    found = []
    for file in sorted(heard.glob("*-int8.json")):
        if file.stem.startswith("heldout"):  # synthetic voices
            continue
        for recording in read_json(file)["recordings"]:
            transcript = recording["transcript"]
            if len(transcript.split()) >= SHORTEST and {item["text"] for item in recording["heard"]} == {transcript}:
                found.append(f"{file.stem.removesuffix('-int8')}/{recording['name']}\t{transcript}")
    yield from sorted(found, key=len, reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--understood", action="store_true", help="only list sentences")
    args = parser.parse_args()
    if args.understood:
        print("\n".join(understood(args.work_dir / "heard")))
        return
    folder = args.work_dir / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    gap = np.zeros(int(GAP_S * SAMPLE_RATE), np.int16)
    notes = []
    for name, (parts, transcript, origin) in CLIPS.items():
        pieces = [soundfile.read(args.work_dir / "test" / f"{part}.flac", dtype="int16")[0] for part in parts]
        samples = np.concatenate([sound for piece in pieces for sound in (piece, gap)][:-1])
        soundfile.write(folder / f"{name}.flac", samples, SAMPLE_RATE)
        notes.append(f"{name}.flac\t{transcript}\t{origin}\n")
    (folder / "clips.tsv").write_text("".join(notes), encoding="utf-8")


if __name__ == "__main__":
    main()
