"""Recordings out of the packs that the run has heard, and a list of them: for `u2moe quantize --calibrate`.

No test set has any of their utterances.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import soundfile
from corpus import SAMPLE_RATE, SPEECH, Pack, Utterance

PACKS = ("queen-train", "sky-train", "drascula-train", "pico-us", "espeak", "hibari-others")
"""Actors out of three games, and the voices of three synthesizers."""
SECONDS = 900
"""Of audio in all, which is what `u2moe quantize` takes at most."""


def spread(utterances: Sequence[Utterance], seconds: float) -> list[Utterance]:
    """Utterances of about that many seconds together, evenly spread over all; all if they are not longer."""
    total = sum(utterance.length for utterance in utterances) / SAMPLE_RATE
    return list(utterances[:: max(round(total / seconds), 1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write calibration.tsv and the recordings")
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in PACKS:
        pack = Pack(args.work_dir / "speech" / name, SPEECH)
        samples = pack.map()
        for number, utterance in enumerate(spread(pack.utterances, SECONDS / len(PACKS))):
            file = f"{name}-{number:03d}.wav"
            soundfile.write(
                args.folder / file, samples[utterance.offset : utterance.offset + utterance.length], SAMPLE_RATE
            )
            lines.append(f"{file}\t{utterance.text}\n")
    (args.folder / "calibration.tsv").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
