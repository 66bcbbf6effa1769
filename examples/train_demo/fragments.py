"""Cuts words and short phrases from actors' speech, where PocketSphinx finds pauses, or the borders of a word.

Actors speak in sentences, but menus, talking clocks and dictation contain single words. Run it again to resume.
"""

import argparse
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import urquan
from corpus import FRAGMENTS, SAMPLE_RATE, SPEECH, Pack, to_float, to_pcm
from games import GAMES
from numpy.typing import NDArray
from phones import FRAMES_PER_S, Aligner, Stretch
from synthesize import plausible

Samples = NDArray[np.float32]

SOURCES = (*(f"{game}-train" for game in GAMES), urquan.NAME)
FRAME = SAMPLE_RATE // FRAMES_PER_S
MAX_WORDS = 4
"""Maximum number of words in a phrase."""
PAUSE = 8
"""Minimum frames of silence between two phrases."""
MARGIN = 20
"""Maximum frames that a phrase keeps of the pause on either side."""
MIN_WORD = 20
"""Minimum frames of a word cut from fluent speech. Shorter words are barely pronounced."""
FADE = SAMPLE_RATE // 100
AROUND = SAMPLE_RATE // 10
"""Samples of silence around a word that is cut from fluent speech."""


def name_of(source: str) -> str:
    """Return the name of the pack that has the fragments of a pack of speech."""
    return source.removesuffix("-train") + FRAGMENTS


def phrases(stretches: list[Stretch], num_frames: int) -> list[list[Stretch]]:
    """Return groups of words between pauses. The first and last stretch of a group are the pauses around it."""
    groups: list[list[Stretch]] = [[Stretch(None, 0, 0)]]
    for stretch in stretches:
        if stretch.word is not None:
            groups[-1].append(stretch)
        elif stretch.end - stretch.first >= PAUSE:
            groups[-1].append(stretch)
            groups.append([stretch])
    groups[-1].append(Stretch(None, num_frames, num_frames))
    return [group for group in groups if any(stretch.word for stretch in group)]


def phrase_borders(group: list[Stretch]) -> tuple[int, int]:
    """Return the first frame and the end of a phrase. It keeps half of each pause around it, but at most `MARGIN`."""
    before, *_, after = group
    first = group[1].first - min((before.end - before.first) // 2, MARGIN)
    return first, group[-2].end + min((after.end - after.first) // 2, MARGIN)


def alone(samples: Samples) -> Samples:
    """Return a word cut from fluent speech, with soft edges and silence around it."""
    fade = np.linspace(0, 1, FADE, dtype=np.float32)
    word = samples.copy()
    word[:FADE] *= fade
    word[-FADE:] *= fade[::-1]
    return np.pad(word, AROUND)


def fragments(samples: Samples, stretches: list[Stretch], rng: random.Random) -> Iterator[tuple[Samples, str]]:
    """Yield the phrases of a line that have at most `MAX_WORDS` words, and one word from its longer phrases.

    If the line is a single phrase, yield only a word of it.
    """
    groups = phrases(stretches, len(samples) // FRAME)
    inner: list[Stretch] = []
    for group in groups:
        words = [stretch for stretch in group if stretch.word]
        if len(words) > MAX_WORDS or (len(groups) == 1 and len(words) > 1):
            inner += [word for word in words if word.end - word.first >= MIN_WORD]
        elif len(groups) > 1:
            first, end = phrase_borders(group)
            yield samples[first * FRAME : end * FRAME], " ".join(word.word or "" for word in words)
    if inner:
        word = rng.choice(inner)
        yield alone(samples[word.first * FRAME : word.end * FRAME]), word.word or ""


def cut(source: Pack, path: Path) -> str:
    """Fill the pack that has the fragments of `source`. Return a line for the terminal."""
    aligner, rows = Aligner(), source.map()
    with Pack(path, SPEECH) as pack:
        number = unaligned = 0
        for line in source.utterances:
            samples = to_float(rows[line.offset : line.offset + line.length])
            rng = random.Random(f"{path.name} {line.offset}")
            words = aligner.words(samples, line.text)
            unaligned += words is None
            for piece, text in fragments(samples, words or [], rng):
                if plausible(piece, text):
                    number += 1
                    if number > len(pack.utterances):
                        pack.append(to_pcm(piece), line.voice, text)
        hours = pack.num_rows / SAMPLE_RATE / 3600
        lines = f"{unaligned} of {len(source.utterances)} lines could not be aligned"
        return f"{path.name}: {len(pack.utterances)} fragments, {hours:.2f} h; {lines}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    speech = args.work_dir / "speech"
    with ProcessPoolExecutor(args.processes) as pool:
        for job in [pool.submit(cut, Pack(speech / name, SPEECH), speech / name_of(name)) for name in SOURCES]:
            print(job.result(), flush=True)


if __name__ == "__main__":
    main()
