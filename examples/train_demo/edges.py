"""Measures the loss from cutting recordings at their first and last sound, and the gain from silence around them.

    python edges.py exp/release/int8

Words and phrases are cut from the lines of `queen-dev`, without the pauses around them; training never uses its actors.
The sets on which decisions are made are measured uncut. Writes `edges.json`.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluate import Count
from fragments import FRAME, MIN_WORD, phrases
from phones import Aligner, Stretch
from release import DEV
from spelling import normalize

from u2moe.benchmarks.results.files import measured_here, write_json
from u2moe.runtime import DecodingOptions, Recognizer
from u2moe.runtime.audio.arrays import Samples
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.text.word_errors import edit_distance, words

HERE = Path(__file__).parent
PADDINGS_S = (0.0, 0.06, 0.12, 0.18, 0.24, 0.3, 0.48)
CHUNK_SIZES = (None, 16)
WORDS_OF_LINE = 2
LONGEST_PHRASE = 5
"""Maximum number of words in a phrase."""
SHORTEST = 15
"""Minimum number of frames of a cut piece."""

Item = tuple[Samples, str]


def aligned(lines: list[Item]) -> Iterator[tuple[Samples, list[Stretch]]]:
    """Yield the lines with the times of their words. Skip lines with words that the aligner does not know."""
    aligner = Aligner()
    for samples, text in lines:
        if stretches := aligner.words(samples, text):
            yield samples, stretches


def cut(samples: Samples, stretches: list[Stretch]) -> Item:
    """Return words of a line without the audio around them."""
    text = " ".join(stretch.word or "" for stretch in stretches)
    return samples[stretches[0].first * FRAME : stretches[-1].end * FRAME], text.upper()


def single_words(lines: list[tuple[Samples, list[Stretch]]]) -> list[Item]:
    """Return some words of each line, cut out."""
    rng, found = random.Random(0), []
    for samples, stretches in lines:
        long = [stretch for stretch in stretches if stretch.word and stretch.end - stretch.first >= MIN_WORD]
        found += [cut(samples, [word]) for word in rng.sample(long, min(WORDS_OF_LINE, len(long)))]
    return found


def short_phrases(lines: list[tuple[Samples, list[Stretch]]]) -> list[Item]:
    """Return short phrases between pauses of each line, cut out."""
    found = []
    for samples, stretches in lines:
        for group in phrases(stretches, len(samples) // FRAME):
            spoken = [stretch for stretch in group if stretch.word]
            if len(spoken) <= LONGEST_PHRASE and spoken[-1].end - spoken[0].first >= SHORTEST:
                found.append(cut(samples, spoken))
    return found


def heard(recognizer: Recognizer, items: list[Item]) -> dict[str, Any]:
    """Return word errors by padding and context."""
    results: dict[str, Any] = {}
    for padding_s in PADDINGS_S:
        for chunk_size in CHUNK_SIZES:
            count, options = (
                Count(),
                DecodingOptions(padding_s=padding_s, chunk_size=chunk_size, beam_size=10, language_model="none"),
            )
            for samples, transcript in items:
                reference = words(transcript)
                text = normalize(recognizer.transcribe(samples, options=options).text)
                count.add(edit_distance(reference, words(text)), len(reference))
            results[f"{padding_s} {chunk_size or 'full'}"] = count.data()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args()
    recognizer = Recognizer.from_pretrained(args.bundle, kernels="onnxruntime")
    rate = recognizer.bundle.manifest.features.sample_rate
    manifests = [args.work_dir / name for name in (DEV, "test/heldout.tsv")]
    whole = {
        manifest.stem: [(read_audio(item.path, rate), item.transcript) for item in read_recordings(manifest)]
        for manifest in manifests
    }
    lines = list(aligned(whole["queen-dev"]))
    sets = {"words": single_words(lines), "phrases": short_phrases(lines), **whole}
    results: dict[str, Any] = {**measured_here(), "paddings_s": PADDINGS_S, "sets": {}}
    for name, items in sets.items():
        results["sets"][name] = heard(recognizer, items)
        print(name, {key: f"{found['wer']:.1%}" for key, found in results["sets"][name].items()}, flush=True)
    write_json(args.output / "edges.json", results)


if __name__ == "__main__":
    main()
