"""`u2moe lm`: train, convert, tune and attach language models."""

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Never

import numpy as np

from u2moe.runtime.cli.options import add_declared, add_model, chosen_bundle, declared_in, language_model_options
from u2moe.runtime.cli.outputs import try_to_write
from u2moe.runtime.cli.terminal import complain, print_result, show_progress, tell
from u2moe.runtime.corpus.entry import Entry, Sources
from u2moe.runtime.corpus.lists import read_utterances
from u2moe.runtime.decoding import language_model_weights as fusion
from u2moe.runtime.errors import AudioError
from u2moe.runtime.language.files import write_arpa, write_compact
from u2moe.runtime.language.kneser_ney import TrainingOptions, count_ngrams, train
from u2moe.runtime.language.model import LanguageModel
from u2moe.runtime.language.ngrams import Ngrams
from u2moe.runtime.language.sentences import TextOptions, read_sentences
from u2moe.runtime.options import BUNDLED, NONE, BundledOptions, DecodingOptions
from u2moe.runtime.recognizer import Recognizer


def add_lm(parser: argparse.ArgumentParser) -> None:
    """Add `u2moe lm train|build|tune|attach`."""
    parser.description = "N-gram language models for 'u2moe transcribe --lm FILE', 'u2moe listen' and 'u2moe serve'."
    commands = parser.add_subparsers(dest="lm_command", required=True, metavar="COMMAND")
    written = "file to write: ARPA if its name ends in .arpa or .arpa.gz, otherwise compact"

    training = commands.add_parser("train", help="train a model on text")
    training.description = (
        "Estimate an n-gram model from text (modified Kneser-Ney). Punctuation is removed, and sentences "
        "end at '.', '!', '?' and line ends."
    )
    training.add_argument("texts", nargs="+", type=Path, metavar="TEXT", help="text files in UTF-8, plain or .gz")
    training.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=written)
    add_declared(training, TrainingOptions)
    about = "remove n-grams that occur at most N times; one N per order, such as 0 0 1 (default: 0, for none)"
    training.add_argument("--prune", type=int, nargs="+", default=[0], metavar="N", help=about)
    add_declared(training, TextOptions)
    training.set_defaults(run=run_train)

    building = commands.add_parser("build", help="convert a model")
    building.description = "Convert an ARPA file to a compact file, or the other way round."
    building.add_argument("file", type=Path, metavar="FILE", help="ARPA file (also .gz) or compact file")
    building.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=written)
    building.set_defaults(run=run_build)

    tuning = commands.add_parser("tune", help="find the best weights for a model")
    tuning.description = (
        "Find the language model's weights and the blank penalty that give the fewest word errors on "
        "recordings with transcripts. Do not use test data."
    )
    tuning.add_argument("list", type=Path, metavar="LIST", help="list with transcripts, as for u2moe corpus")
    tuning.add_argument("--lm", required=True, metavar="FILE", help="language model; none: tune only the blank penalty")
    add_model(tuning)
    add_declared(tuning, DecodingOptions, BUNDLED)
    tuning.set_defaults(run=run_tune)

    attaching = commands.add_parser("attach", help="put a model into a bundle")
    attaching.description = (
        "Write a language model and its weights into a bundle. All runtimes then use the model by default."
    )
    attaching.add_argument("bundle", metavar="BUNDLE", help="folder of a bundle")
    about = "file and weights, as printed by 'u2moe lm tune'; none: remove the model"
    attaching.add_argument("lm", metavar="MODEL", help=about)
    add_declared(attaching, DecodingOptions, BUNDLED, **dict.fromkeys(BUNDLED, "unchanged"))
    attaching.set_defaults(run=run_attach)


def run_train(args: argparse.Namespace) -> int:
    """Estimate a language model from text."""
    _check_output(args.output)
    options = TrainingOptions(prune=tuple(args.prune), **declared_in(args, TrainingOptions))
    sentences = read_sentences(args.texts, TextOptions(**declared_in(args, TextOptions)))
    counts = count_ngrams(sentences, options.order, min_word_count=options.min_word_count)
    tell(f"{counts.num_sentences} sentences, {counts.counts.sum()} words")
    _write(train(counts, options, warn=tell), args.output)
    return 0


def run_build(args: argparse.Namespace) -> int:
    """Convert a language model."""
    _check_output(args.output)
    _write(LanguageModel.open(args.file).ngrams, args.output)
    return 0


def run_tune(args: argparse.Namespace) -> int:
    """Tune the weights of the language model on recordings with transcripts."""
    recognizer = Recognizer.from_pretrained(chosen_bundle(args.model))
    best = None if args.lm == NONE else language_model_options(args.lm)
    decoding: BundledOptions[Never] = dataclasses.replace(
        recognizer.bundle.manifest.decoding, **declared_in(args, BundledOptions)
    )
    encoded = fusion.EncodedRecordings(recognizer.bundle, recognizer.model, decoding)
    _encode(encoded, read_utterances(args.list), recognizer.bundle.manifest.features.sample_rate)
    if not encoded.num_words:
        raise ValueError(f"{args.list}: contains no usable recording with words in its transcript")
    tell("first pass")
    best, decoding, _ = fusion.tune(encoded, best, second_pass=False, on_trial=_tell_trial)
    tuned = list(fusion.FIRST_GRID)
    if recognizer.model.has_decoder and best is not None:
        tell("second pass")
        best, decoding, _ = fusion.tune(encoded, best, decoding, second_pass=True, on_trial=_tell_trial)
        tuned += fusion.SECOND_GRID
    weights = [f"{name}={getattr(best, name):g}" for name in tuned if hasattr(best, name)]
    penalty = f" --blank-penalty {decoding.blank_penalty:g}" if decoding.blank_penalty else ""
    given = [part for part in args.lm.split(",") if part.partition("=")[0] not in tuned]
    print_result(f"--lm {','.join([*given, *weights])}{penalty}\n")
    return 0


def run_attach(args: argparse.Namespace) -> int:
    """Put a language model into a bundle, or remove the one in it."""
    chosen = None if args.lm == NONE else language_model_options(args.lm)
    bundle = fusion.attach(chosen_bundle(args.bundle), chosen, **declared_in(args, BundledOptions))
    decoding = bundle.manifest.decoding
    size = bundle.manifest.files[decoding.language_model.file].size if decoding.language_model else 0
    tell(f"{bundle.path}: beam size {decoding.beam_size}, language model of {size / 1e6:.1f} MB")
    return 0


def _encode(encoded: fusion.EncodedRecordings, utterances: Iterable[Entry], sample_rate: int) -> None:
    with Sources() as sources:
        for number, utterance in enumerate(utterances, start=1):
            show_progress(f"encoding {number}")
            try:
                samples = np.concatenate(list(sources.read_blocks(utterance, sample_rate)))
            except AudioError as error:
                complain(str(error))
                continue
            if utterance.text is None:
                complain(f"{utterance.key}: has no transcript")
            elif len(samples) > fusion.LONGEST_S * sample_rate:
                seconds = len(samples) / sample_rate
                complain(f"{utterance.key}: lasts {seconds:.0f} s, expected at most {fusion.LONGEST_S} s")
            else:
                encoded.add(utterance.text, samples)
    show_progress("")


def _tell_trial(trial: fusion.Trial) -> None:
    weights = ", ".join(f"{name} {value:g}" for name, value in trial.weights.items()) or "no language model"
    tell(f"{trial.num_errors / max(trial.num_words, 1):7.2%}  {weights}")


def _check_output(file: Path) -> None:
    if file.suffix.lower() == ".gz" and not _is_arpa(file):
        raise ValueError(f"{file}: only ARPA files can be compressed: use a name that ends in .arpa.gz")
    try_to_write(file)


def _is_arpa(file: Path) -> bool:
    return file.name.lower().endswith((".arpa", ".arpa.gz"))


def _write(ngrams: Ngrams, file: Path) -> None:
    (write_arpa if _is_arpa(file) else write_compact)(ngrams, file)
    numbers = ", ".join(f"{count} {length}-grams" for length, count in enumerate(ngrams.num_ngrams, start=1))
    tell(f"{file}: {numbers}, {file.stat().st_size / 1e6:.1f} MB")
