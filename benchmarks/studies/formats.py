"""How do number formats and kernels change word errors? Compares variants of a model on the same recordings.

    python -m u2moe.benchmarks.studies.formats float32=FOLDER int8=FOLDER 'int8, onnxruntime alone=FOLDER@onnxruntime'
        --list SET.tsv ... [--results FILE]

A variant is a bundle, optionally with @KERNELS ("native" or "onnxruntime"; default: native if installed). +noise adds
random numbers of at most half a 16-bit step to the samples. It shows how many texts are altered by such small changes.
All variants are compared with the first two. A paired bootstrap over recordings gives 95 % intervals of the
differences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from u2moe.benchmarks.instruments.statistics import ratio_of_sums, show_progress, spread_of
from u2moe.benchmarks.results.files import of_bundle, publish
from u2moe.benchmarks.results.markdown import Target, table
from u2moe.benchmarks.studies.shared.script import named, script, study_parser
from u2moe.runtime import DecodingOptions, Recognizer
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.text.word_errors import edit_distance, words

MODES = {"full context": DecodingOptions(), "chunk 16, left 4": DecodingOptions(chunk_size=16, num_left_chunks=4)}
NUM_REFERENCES = 2
HALF_STEP = 0.5 / 32768  # half a quantization step of 16-bit audio
LIMITS = {("int8", "float32"): 0.3, ("int4-experts, calibrated", "int8"): 0.5, ("int4, calibrated", "int8"): 1.5}
"""Maximum increase in word errors, in percent, with full context, by (variant, reference)."""
LIMIT_OF_TEXTS = 7.5  # maximum percentage of recordings whose text differs between int8 and float32

Texts = dict[str, list[list[str]]]  # words of each recording, by mode


class Variant(NamedTuple):
    """A bundle's folder, the kernels to use (None: the default), and whether to add noise to the audio."""

    folder: Path
    kernels: str | None
    noise: bool

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Return the variant that `text` describes as FOLDER[@KERNELS][+noise]."""
        before = text.removesuffix("+noise")
        folder, _, kernels = before.partition("@")
        return cls(Path(folder), kernels or None, before != text)


def recognized(recognizer: Recognizer, recordings: Sequence[Recording], *, noise: bool = False) -> Texts:
    """Return the words of all recordings in each mode. `noise`: every call adds the same noise, at most `HALF_STEP`."""
    rate = recognizer.bundle.manifest.features.sample_rate
    texts: Texts = {mode: [] for mode in MODES}
    random = np.random.default_rng(0)
    for recording in recordings:
        samples = read_audio(recording.path, rate)
        if noise:
            samples = samples + random.uniform(-HALF_STEP, HALF_STEP, len(samples)).astype(np.float32)
        for mode, options in MODES.items():
            texts[mode].append(words(recognizer.transcribe(samples, options=options).text))
    return texts


def measure(variants: Mapping[str, Variant], sets: Mapping[str, Sequence[Recording]]) -> dict[str, Any]:
    """Measure the word errors of each variant, and the differences from the first two variants.

    `beside` has these differences by mode: `cost`, the ratio of the total errors with its 95 % interval, and the
    numbers of recordings whose text differs, `num_other_texts`, and of edits between the texts, `num_other_words`.
    """
    recordings = [recording for own in sets.values() for recording in own]
    names = [name for name, own in sets.items() for _ in own]
    said = [words(recording.transcript) for recording in recordings]
    texts, found = dict[str, Texts](), dict[str, dict[str, Any]]()
    for name, variant in variants.items():
        show_progress(name)
        recognizer = Recognizer.from_pretrained(variant.folder, kernels=variant.kernels)
        texts[name] = recognized(recognizer, recordings, noise=variant.noise)
        size = sum(file.size for file in recognizer.bundle.manifest.files.values())
        kernels = str(recognizer.model.kernels)
        found[name] = {**of_bundle(variant.folder), "bytes": size, "kernels": kernels, "modes": {}}
    for mode in MODES:
        errors = {name: list(map(edit_distance, said, own[mode])) for name, own in texts.items()}
        for name, item in found.items():
            item["modes"][mode] = {"num_errors": _by_set(names, errors[name]), "beside": {}}
            for reference in [other for other in list(variants)[:NUM_REFERENCES] if other != name]:
                changes = list(map(edit_distance, texts[reference][mode], texts[name][mode]))
                counts = {"num_other_texts": sum(map(bool, changes)), "num_other_words": sum(changes)}
                cost = ratio_of_sums(errors[name], errors[reference]).data()
                item["modes"][mode]["beside"][reference] = {"cost": cost, **counts}
    num_words = _by_set(names, list(map(len, said)))
    return {"num_recordings": len(recordings), "num_words": num_words, "variants": found}


def _by_set(names: Sequence[str], counts: Sequence[int]) -> dict[str, int]:
    return {name: sum(count for own, count in zip(names, counts, strict=True) if own == name) for name in names}


def targets(results: Mapping[str, Any]) -> Iterator[Target]:
    """Yield targets for the increase in word errors of each format, and for the share of texts that int8 changes."""
    mode = next(iter(MODES))
    found = {name: variant["modes"][mode]["beside"] for name, variant in results["variants"].items()}
    for (name, reference), limit in LIMITS.items():
        if reference in found.get(name, {}):
            cost = 100 * (spread_of(found[name][reference]["cost"]).median - 1)
            title = f"demo model, {mode}: increase of word errors from {reference} to {name}"
            yield Target(name=title, found=cost, limit=limit, at_most=True, unit=" %")
    if "float32" in found.get("int8", {}):
        texts = 100 * found["int8"]["float32"]["num_other_texts"] / results["num_recordings"]
        title = f"demo model, {mode}: recordings whose text differs between float32 and int8"
        yield Target(name=title, found=texts, limit=LIMIT_OF_TEXTS, at_most=True, unit=" %")


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for pages: a row for each mode and variant, and the results of each variant by name."""
    num_words, references = results["num_words"], list(results["variants"])[:NUM_REFERENCES]
    total, rows = sum(num_words.values()), []
    shown = {"recordings": str(results["num_recordings"]), "words": str(total)}
    for mode in MODES:
        for name, variant in results["variants"].items():
            item = variant["modes"][mode]
            rates = [f"{item['num_errors'][own] / num_words[own]:.1%}" for own in num_words]
            whole = f"{sum(item['num_errors'].values()) / total:.2%}"
            costs = [_cost(item["beside"][other]) if other in item["beside"] else "" for other in references]
            size = f"{variant['bytes'] / 1e6:.1f}"
            rows.append((mode, name, size, *rates, whole, *costs))
            key = re.sub(r"\W+", "_", name) + (".full" if mode == "full context" else ".chunks")
            shown[key], shown[f"{key.partition('.')[0]}.mb"] = whole, size
            for other, beside in item["beside"].items():
                shown[f"{key}.{other}"] = _cost(beside)
                shown[f"{key}.{other}.texts"] = f"{beside['num_other_texts'] / results['num_recordings']:.0%}"
                shown[f"{key}.{other}.words"] = f"{beside['num_other_words'] / total:.1%}"
    sizes = [f"{name} ({count})" for name, count in num_words.items()]
    header = ("context", "variant", "MB", *sizes, "all", *(f"errors vs. {name}" for name in references))
    return {"table": table(header, rows, left=2), **shown}


def _cost(beside: Mapping[str, Any]) -> str:
    cost = spread_of(beside["cost"])
    return f"{cost.median - 1:+.1%} ({cost.low - 1:+.1%} to {cost.high - 1:+.1%})"


@script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("formats", __doc__)
    parser.add_argument("variants", nargs="+", type=named, metavar="NAME=FOLDER[@KERNELS][+noise]")
    parser.add_argument("--list", nargs="+", type=Path, required=True, help="lists of recordings: path<TAB>transcript")
    args = parser.parse_args(arguments)
    sets = {manifest.stem: read_recordings(manifest) for manifest in args.list}
    variants = {name: Variant.parse(text) for name, text in args.variants}
    publish(args.results, measure(variants, sets), values)
