"""Speaks sentences with every installed synthetic voice into one pack per voice; run again to resume.

An utterance depends only on its voice and number, so packs can be reproduced anywhere, in any number of sessions. Some
voices are held out: they speak only in `heldout.pcm`, the synthetic test set.
"""

import argparse
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from corpus import SAMPLE_RATE, SPEECH, Pack, resample, to_pcm
from spelling import normalize
from texts import Sentences, Sources, Words, Written
from voices import Samples, speaker

HOURS = {
    "hibari": 10.0, "pico-us": 6.0, "pico-gb": 6.0, "flite-rms": 5.0, "flite-awb": 5.0, "flite-kal16": 1.5,
    "hibari-words": 0.7, "pico-us-words": 0.7, "pico-gb-words": 0.7, "flite-rms-words": 0.5, "flite-awb-words": 0.5,
    "espeak": 6.0, "espeak-words": 1.5, "hibari-others": 10.0, "hibari-others-words": 1.0, "kokoro-words": 2.0,
    "hibari-others-definitions": 10.0, "rhvoice": 3.0, "rhvoice-words": 1.0, "piper-joe": 2.0,
    "hibari-others-dictionaries": 10.0, "pico-us-dictionaries": 4.0, "pico-gb-dictionaries": 4.0,
    "flite-rms-dictionaries": 3.0, "rhvoice-dictionaries": 3.0, "kokoro-others": 10.0, "kokoro": 20.0,
}  # fmt: skip
"""Hours of speech wanted in each pack. The slow voices come last and may stop early."""
Text = Sentences | Words | Written
KINDS: dict[str, Callable[[Sources], Text]] = {
    "-words": Words,
    "-definitions": lambda sources: Written(sources.definitions()),
    "-dictionaries": lambda sources: Written(sources.dictionaries()),
}
"""Kind of texts by the end of a pack's name. Other packs contain sentences."""
HELD_OUT = ("flite-slt", "festival-ked", "espeak-scotland")
HELD_OUT_SENTENCES = 50
MAX_ATTEMPTS = 20


def trimmed(samples: Samples, rng: random.Random) -> Samples:
    """Return the speech scaled to a peak of 0.5, with at most 0.05 to 0.4 s of silence on either side."""
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max(initial=0))
    if len(loud) < SAMPLE_RATE // 8:
        return samples[:0]
    start = max(0, loud[0] - int(rng.uniform(0.05, 0.4) * SAMPLE_RATE))
    speech = samples[start : loud[-1] + int(rng.uniform(0.05, 0.4) * SAMPLE_RATE)]
    return np.asarray(speech * (0.5 / np.abs(speech).max()), np.float32)


def hours(pack: Pack) -> float:
    return pack.num_rows / SAMPLE_RATE / 3600


def plausible(samples: Samples, text: str) -> bool:
    """Return whether the duration of the speech, without pauses, fits the text: 3 to 32 characters a second."""
    seconds = len(samples) / SAMPLE_RATE
    return len(text) / 32 < max(seconds - 0.3, 0.1) and seconds - 0.9 < len(text) / 3 and 0 < seconds < 16


def speak_all(name: str, voice: str, pack: Pack, sentences: Text, wanted: Callable[[], bool]) -> None:
    """Append sentences to the pack while more is wanted. Implausibly fast or slow speech is synthesized again."""
    speak = speaker(voice)
    while wanted():
        for attempt in range(MAX_ATTEMPTS):
            rng = random.Random(f"{name} {len(pack.utterances)} {attempt}")
            sentence = sentences.draw(rng)
            speech = speak(sentence, rng)
            samples = trimmed(resample(speech.samples, speech.rate), rng)
            if plausible(samples, text := normalize(sentence)):
                pack.append(to_pcm(samples), speech.voice or voice, text)
                break
        else:
            raise RuntimeError(f"{name}: no plausible speech in {MAX_ATTEMPTS} attempts, the last for {sentence!r}")


def speak_hours(name: str, sources: Sources, folder: Path, deadline: float) -> str:
    """Fill the pack of a training voice. Return a line for the log."""
    kind = next((kind for kind in KINDS if name.endswith(kind)), "")
    voice, sentences = name.removesuffix(kind), KINDS.get(kind, Sentences)(sources)
    with Pack(folder / name, SPEECH) as pack:
        speak_all(name, voice, pack, sentences, lambda: hours(pack) < HOURS[name] and time.time() < deadline)
        return f"{name}: {hours(pack):.2f} h, {len(pack.utterances)} utterances"


def speak_heldout(sources: Sources, folder: Path) -> str:
    """Fill the synthetic test set with the same number of sentences by each held-out voice."""

    def wanted(pack: Pack, goal: int) -> bool:
        return len(pack.utterances) < goal

    with Pack(folder / "heldout", SPEECH) as pack:
        for number, voice in enumerate(HELD_OUT, start=1):
            speak_all(voice, voice, pack, Sentences(sources), partial(wanted, pack, number * HELD_OUT_SENTENCES))
        return f"held out: {len(pack.utterances)} utterances"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--debian", type=Path, required=True, help="folder with the unpacked Debian packages")
    parser.add_argument("--packs", nargs="*", default=list(HOURS))
    parser.add_argument("--minutes", type=float, default=30, help="start no new utterances after this many minutes")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    deadline = time.time() + 60 * args.minutes
    sources, folder = Sources(debian=args.debian), args.work_dir / "speech"
    with ProcessPoolExecutor(args.processes) as pool:
        jobs = [pool.submit(speak_heldout, sources, folder)]
        jobs += [pool.submit(speak_hours, name, sources, folder, deadline) for name in args.packs]
        for job in jobs:
            print(job.result(), flush=True)


if __name__ == "__main__":
    main()
