"""Command-line options of language models, for every command that recognises speech."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from u2moe.runtime.language.model import LanguageModelOptions

DEMO = "demo"
"""The name of the model that comes with the demo model; ./demo is a file."""
_NUMBERS = {
    "weight": "weight of its log-probabilities (default: 0.5)",
    "word_bonus": "added for each word (default: 0.5)",
    "unknown_score": "added for words that the model does not have, before the weight (default: -5)",
    "rescoring_weight": "factor for its score in the second pass (default: 1)",
}
"""Options of `LanguageModelOptions` that are numbers."""


def add_language_model(parser: argparse.ArgumentParser) -> None:
    """--lm and what belongs to it."""
    group = parser.add_argument_group("language model")
    group.add_argument(
        "--lm",
        metavar="FILE",
        help="n-gram model: ARPA, .gz, or made by 'u2moe lm'; demo: the English one that comes with the demo model",
    )
    for name, text in _NUMBERS.items():
        group.add_argument(f"--lm-{name.replace('_', '-')}", type=float, metavar="X", help=text)
    group.add_argument("--lm-level", choices=("word", "token"), help="what it predicts (default: as its symbols look)")
    group.add_argument(
        "--lm-class",
        action="append",
        metavar="WORD=FILE",
        help="words, one per line, that are as probable as this word of the model, such as '<name>'; may be repeated",
    )


def language_model_options(args: argparse.Namespace) -> LanguageModelOptions | None:
    """The language model, if there is one.

    Raises:
        LanguageModelError: it cannot be read.
        ValueError: options are out of range, or given without --lm.
    """
    given = {name: getattr(args, f"lm_{name}") for name in (*_NUMBERS, "level")}
    chosen = {name: value for name, value in given.items() if value is not None}
    if args.lm is None:
        if chosen or args.lm_class:
            raise ValueError("--lm-weight and the like need --lm FILE")
        return None
    chosen["classes"] = _classes(args.lm_class or [])
    if args.lm == DEMO:
        return LanguageModelOptions.demo(**chosen)
    return LanguageModelOptions(model=args.lm, **chosen)


def _classes(values: list[str]) -> dict[str, list[str]]:
    classes: dict[str, list[str]] = defaultdict(list)
    for value in values:
        name, separator, file = value.rpartition("=")
        if not separator or not name:
            raise ValueError(f"--lm-class must be WORD=FILE, got {value!r}")
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error
        classes[name] += [line.strip() for line in lines if line.strip()]
    return classes
