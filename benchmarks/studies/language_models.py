"""What does a language model find? Word errors with models in the first pass and in the second.

    python -m u2moe.benchmarks.studies.language_models BUNDLE --sets LIST.tsv ... --model NAME FILE TEXT DEV ...

Every recording is encoded once, with full context. The weights of each model are tuned on its development sets (names
separated by commas), first for the first pass, then its factor for the second; all other sets are tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import publish
from u2moe.benchmarks.results.targets import Target
from u2moe.benchmarks.studies.shared.script import report, run_script, script_parser
from u2moe.runtime import Bundle, LanguageModel, LanguageModelOptions, Model
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.decoding.language_model_weights import EncodedRecordings, tune
from u2moe.runtime.language.sentences import TextOptions, read_sentences

PASSES = {"first": False, "second": True}
IN_PACKAGE = "small"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A language model to judge: its name, its file, its text, and the sets on which its weights are tuned."""

    name: str
    file: Path
    text: Path
    dev: tuple[str, ...]


def encode(bundle: Bundle, model: Model, manifests: Iterable[Path]) -> dict[str, EncodedRecordings]:
    """The recordings of each set."""
    sets = {}
    for path in manifests:
        sets[path.stem] = EncodedRecordings(bundle, model)
        for recording in read_recordings(path):
            sets[path.stem].add(recording.transcript, read_audio(recording.path, bundle.manifest.features.sample_rate))
        report(f"{path.stem}: {len(sets[path.stem].recordings)} recordings")
    return sets


def together(bundle: Bundle, model: Model, sets: Iterable[EncodedRecordings]) -> EncodedRecordings:
    """Several sets as one."""
    union = EncodedRecordings(bundle, model)
    for recordings in sets:
        union.recordings += recordings.recordings
    return union


def judge(bundle: Bundle, model: Model, sets: Mapping[str, EncodedRecordings], candidate: Candidate) -> dict[str, Any]:
    """Tuned weights and word errors of a model in each pass, and its size."""
    language_model = LanguageModel.open(candidate.file)
    dev = together(bundle, model, [sets[name] for name in candidate.dev])
    passes = {}
    best = LanguageModelOptions(model=language_model, weight=0.3, word_bonus=1.0)
    for name, second_pass in PASSES.items():
        best, trials = tune(dev, best, second_pass=second_pass)
        errors = {other: own.word_errors(best, second_pass=second_pass).num_errors for other, own in sets.items()}
        weights = {key: getattr(best, key) for key in trials[-1].weights}
        passes[name] = {"weights": weights, "num_trials": len(trials), "num_errors": errors}
        report(f"{candidate.name}, {name} pass: {weights} {errors}")
    text = read_sentences([candidate.text], TextOptions(raw=True))
    return {
        "num_ngrams": language_model.ngrams.num_ngrams,
        "num_bytes": candidate.file.stat().st_size,
        "num_text_words": sum(map(len, text)),
        "dev": candidate.dev,
        "passes": passes,
    }


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: word errors by set and model, and the models with their weights."""
    models, sets = results["models"], results["sets"]
    tuned = {name for found in models.values() for name in found["dev"]}
    tests = [name for name in sets if name not in tuned]
    listed = [*tests, *sorted(tuned)]
    shown: dict[str, str] = {}
    for number in PASSES:
        rows = []
        for name in listed:
            num_words = sets[name]["num_words"]
            rates = [sets[name][number], *(found["passes"][number]["num_errors"][name] for found in models.values())]
            title = f"{name} (development)" if name in tuned else name
            rows.append((title, num_words, *(f"{errors / num_words:.1%}" for errors in rates)))
        total = sum(sets[name]["num_words"] for name in tests)
        without = sum(sets[name][number] for name in tests)
        sums = [sum(found["passes"][number]["num_errors"][name] for name in tests) for found in models.values()]
        rows.append(("all tests", total, *(f"{errors / total:.1%}" for errors in (without, *sums))))
        shown[f"{number}_pass"] = table(("set", "words", "no model", *models), rows)
        for name, errors in zip(models, sums, strict=True):
            shown[f"{number}_{name}"] = f"{1 - errors / without:.1%}"
        shown[f"{number}_without"] = f"{without / total:.1%}"
    rows = []
    for name, found in models.items():
        weights = [" ".join(f"{value:g}" for value in found["passes"][number]["weights"].values()) for number in PASSES]
        sizes = " + ".join(f"{count:,}" for count in found["num_ngrams"])
        size = f"{found['num_bytes'] / 1e6:.2f} MB"
        rows.append((name, f"{found['num_text_words']:,}", sizes, size, ", ".join(found["dev"]), *weights))
    header = ("model", "words of text", "n-grams", "file", "tuned on", "weights, first pass", "weights, second pass")
    shown["models"] = table(header, rows)
    shown["table"] = shown["second_pass"]
    return shown


def targets(results: Mapping[str, Any]) -> list[Target]:
    """What the model that comes with the package has to gain."""
    shown = values(results)
    return [
        Target(
            name="word errors that the language model of the package corrects, second pass",
            found=float(shown[f"second_{IN_PACKAGE}"].rstrip("%")), limit=5, at_most=False, unit=" %",
        ),
        Target(
            name="size of that model", found=results["models"][IN_PACKAGE]["num_bytes"] / 1e6, limit=2, at_most=True,
            unit=" MB",
        ),
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = script_parser("studies.language_models", __doc__)
    parser.add_argument("bundle", type=Path, help="folder of a bundle")
    parser.add_argument("--sets", type=Path, nargs="+", required=True, help="lists of recordings: path<TAB>transcript")
    parser.add_argument(
        "--model",
        nargs=4,
        action="append",
        required=True,
        metavar=("NAME", "FILE", "TEXT", "DEV"),
        help="a model, its text, and the sets to tune it on, separated by commas",
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    bundle = Bundle.open(args.bundle)
    model = bundle.load()
    sets = encode(bundle, model, args.sets)
    found: dict[str, Any] = {"sets": {}, "models": {}}
    for name, own in sets.items():
        errors = {key: own.word_errors(None, second_pass=second_pass) for key, second_pass in PASSES.items()}
        numbers = {key: counted.num_errors for key, counted in errors.items()}
        found["sets"][name] = {"num_words": errors["first"].num_words, **numbers}
        report(f"{name}: {found['sets'][name]}")
    for name, file, text, dev in args.model:
        candidate = Candidate(name=name, file=Path(file), text=Path(text), dev=tuple(dev.split(",")))
        found["models"][name] = judge(bundle, model, sets, candidate)
    publish(args.bundle, found, values, args.output)
    return 0


if __name__ == "__main__":
    run_script(main)
