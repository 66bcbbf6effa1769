"""`u2moe lm`: train, convert and tune language models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from u2moe.runtime.cli.language_model import DEMO
from u2moe.runtime.cli.outputs import try_to_write
from u2moe.runtime.cli.terminal import complain, print_result, show_progress, tell
from u2moe.runtime.language.arpa import write_arpa
from u2moe.runtime.language.compact import BITS, write_compact
from u2moe.runtime.language.ngrams import Ngrams


def add_lm(subparsers: Any) -> None:
    """`u2moe lm train|build|tune`."""
    parser = subparsers.add_parser(
        "lm",
        help="make language models for a domain",
        description="N-gram language models for 'u2moe transcribe --lm FILE', 'u2moe listen' and 'u2moe serve'.",
    )
    commands = parser.add_subparsers(dest="lm_command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_build(commands)
    _add_tune(commands)


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="make a model from text",
        description="Estimate an n-gram model from text (modified Kneser-Ney). Punctuation is removed, and sentences "
        "end at full stops and lines.",
    )
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT", help="text files in UTF-8, plain or .gz")
    _add_output(parser)
    parser.add_argument("--order", type=int, default=3, metavar="N", help="longest n-grams, 1 to 5 (default: 3)")
    parser.add_argument(
        "--prune",
        type=int,
        nargs="+",
        default=[0],
        metavar="N",
        help="counts up to which n-grams of each order are left out, such as 0 0 1 (default: 0, none)",
    )
    parser.add_argument(
        "--min-word-count", type=int, default=1, metavar="N", help="rarer words count as <unk> (default: 1)"
    )
    parser.add_argument("--raw", action="store_true", help="use lines as they are: words or tokens between spaces")
    parser.add_argument("--keep-case", action="store_true", help="keep capital letters, for vocabularies with both")
    parser.set_defaults(run=run_train)


def _add_build(commands: Any) -> None:
    parser = commands.add_parser(
        "build", help="convert a model", description="Convert an ARPA file into a compact file, or back."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="ARPA file (also .gz) or compact file")
    _add_output(parser)
    parser.set_defaults(run=run_build)


def _add_tune(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="find the weights of a model",
        description="Find the weights with the fewest word errors on recordings with transcripts, which no test may "
        "contain.",
    )
    parser.add_argument("list", type=Path, metavar="LIST", help="lines of 'path<TAB>transcript'")
    parser.add_argument("--lm", required=True, metavar="FILE", help="the language model, or demo")
    parser.add_argument("--model", type=Path, metavar="BUNDLE", help="folder of a bundle (default: the demo model)")
    parser.add_argument(
        "--first-pass",
        action="store_true",
        help="count errors of the first pass, for use with --search ctc_prefix_beam",
    )
    parser.set_defaults(run=run_tune)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help=".arpa or .arpa.gz; otherwise a compact file"
    )
    parser.add_argument("--bits", type=int, choices=BITS, help="bits of a probability in a compact file (default: 16)")


def run_train(args: argparse.Namespace) -> int:
    """Estimate a model from text."""
    from u2moe.runtime.language.counts import count_ngrams
    from u2moe.runtime.language.kneser_ney import TrainingOptions, train
    from u2moe.runtime.language.sentences import TextOptions, read_sentences

    _check_output(args)
    options = TrainingOptions(order=args.order, prune=tuple(args.prune), min_word_count=args.min_word_count)
    sentences = read_sentences(args.texts, TextOptions(raw=args.raw, keep_case=args.keep_case))
    counts = count_ngrams(sentences, options.order, min_word_count=options.min_word_count)
    tell(f"{counts.num_sentences} sentences, {counts.counts.sum()} words")
    _write(train(counts, options, warn=tell), args)
    return 0


def run_build(args: argparse.Namespace) -> int:
    """Convert a model."""
    from u2moe.runtime.language.model import LanguageModel

    _check_output(args)
    _write(LanguageModel.open(args.file).ngrams, args)
    return 0


def run_tune(args: argparse.Namespace) -> int:
    """Find weights on recordings with transcripts."""
    from u2moe.runtime.audio.reading import read_audio
    from u2moe.runtime.corpus.language_model_tuning import (
        FIRST_GRID,
        LONGEST_S,
        SECOND_GRID,
        EncodedRecordings,
        Trial,
        tune,
    )
    from u2moe.runtime.errors import AudioError
    from u2moe.runtime.language.model import LanguageModelOptions
    from u2moe.runtime.recognizer import Recognizer
    from u2moe.runtime.text.word_errors import read_manifest

    recognizer = Recognizer.from_pretrained(args.model)
    start = LanguageModelOptions.demo() if args.lm == DEMO else LanguageModelOptions(model=args.lm)
    listed, sample_rate = read_manifest(args.list), recognizer.bundle.manifest.features.sample_rate
    encoded = EncodedRecordings(recognizer.bundle, recognizer.model)
    for number, recording in enumerate(listed):
        show_progress(f"encoding {number + 1} of {len(listed)}")
        try:
            samples = read_audio(recording.path, sample_rate)
            if len(samples) > LONGEST_S * sample_rate:
                complain(f"{recording.path}: lasts {len(samples) / sample_rate:.0f} s, only {LONGEST_S} s are possible")
                continue
            encoded.add(recording.transcript, samples)
        except AudioError as error:
            complain(str(error))
    show_progress("")
    if not encoded.num_words:
        raise ValueError(f"{args.list}: no recording with words in its transcript can be used")

    def told(trial: Trial) -> None:
        weights = ", ".join(f"{name} {value:g}" for name, value in trial.weights.items()) or "no language model"
        tell(f"{trial.num_errors / max(trial.num_words, 1):7.2%}  {weights}")

    best = start
    passes = ("first", "second") if recognizer.model.has_decoder and not args.first_pass else ("first",)
    for name in passes:
        tell(f"{name} pass")
        best, _ = tune(encoded, best, second_pass=name == "second", on_trial=told)
    tuned = [*FIRST_GRID, *(SECOND_GRID if "second" in passes else ())]
    options = [f"--lm-{name.replace('_', '-')} {getattr(best, name):g}" for name in tuned]
    print_result(" ".join([f"--lm {args.lm}", *options]) + "\n")
    return 0


def _check_output(args: argparse.Namespace) -> None:
    if _is_arpa(args.output) and args.bits is not None:
        raise ValueError(f"--bits is for compact files, got {args.output}")
    if args.output.suffix.lower() == ".gz" and not _is_arpa(args.output):
        raise ValueError(f"{args.output}: only ARPA files are compressed, expected a name that ends in .arpa.gz")
    try_to_write(args.output)


def _is_arpa(file: Path) -> bool:
    return file.name.lower().endswith((".arpa", ".arpa.gz"))


def _write(ngrams: Ngrams, args: argparse.Namespace) -> None:
    output: Path = args.output
    if _is_arpa(output):
        write_arpa(ngrams, output)
    else:
        write_compact(ngrams, output, bits=args.bits or 16)
    numbers = ", ".join(f"{count} {length}-grams" for length, count in enumerate(ngrams.num_ngrams, start=1))
    tell(f"{output}: {numbers}, {output.stat().st_size / 1e6:.1f} MB")
