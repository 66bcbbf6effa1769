"""Options shared by several commands: the model, how to decode, hotwords and the language model."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn

from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.cli.terminal import tell
from u2moe.runtime.corpus.model_choice import ModelChoice
from u2moe.runtime.decoding.context import parse_hotwords
from u2moe.runtime.language.model import LanguageModelOptions
from u2moe.runtime.model.settings import DEFAULT_PROVIDER, SessionSettings
from u2moe.runtime.options import NONE, SEARCHES, DecodingOptions
from u2moe.runtime.places import DEMO, find_bundle
from u2moe.runtime.text.written.formatter import TextFormat

Subparsers = Any  # argparse has no public names for these
Options = Any
Hotwords = tuple[str | tuple[str, float], ...]

_LM_NUMBERS = ("weight", "word_bonus", "unknown_score", "rescoring_weight")


def meant(name: str, names: Iterable[str]) -> str:
    """A suggestion for an unknown name: ": did you mean NAME?", or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f": did you mean {close[0]}?" if close else ""


class CommandParser(argparse.ArgumentParser):
    """The parser of a command that may have actions besides: `u2moe corpus status OUT` beside `u2moe corpus LIST OUT`.

    If the first argument is the name of an action, that action runs; a file of the same name is ./NAME.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.actions: dict[str, argparse.ArgumentParser] = {}

    def add_action(self, name: str, description: str | None) -> argparse.ArgumentParser:
        """The parser of a new action."""
        action = self.actions[name] = argparse.ArgumentParser(prog=f"{self.prog} {name}", description=description)
        action.set_defaults(parser=action)
        return action

    def error(self, message: str) -> NoReturn:
        """End the program with exit code 2; where a choice is not among those that exist, with what may be meant."""
        found = re.search(r"invalid choice: '(.+)' \(choose from (.+)\)", message)
        super().error(message + (meant(found[1], re.findall(r"[\w-]+", found[2])) if found else ""))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """The options, and arguments that are none."""
        if args and args[0] in self.actions:
            return self.actions[args[0]].parse_known_args(args[1:], namespace)
        return super().parse_known_args(args, namespace)


def add_model(parser: Options) -> None:
    """The option `--model`."""
    parser.add_argument(
        "--model",
        metavar="BUNDLE",
        help="folder of a bundle, or org/name[@revision] on the Hugging Face hub (default: demo, the demo model)",
    )


def add_decoding(parser: Options, *, chunk_size: str) -> Options:
    """Options for model and decoding; `chunk_size` describes the default chunk size.

    Returns:
        The group of options for experts, to which the command may add its own.
    """
    add_model(parser)
    add_words(parser)
    parser.add_argument("--format-text", action="store_true", help="English: digits for numbers, small letters")
    experts = parser.add_argument_group("for experts")
    experts.add_argument(
        "--chunk-size", type=int, metavar="N", help=f"encoder frames per chunk (default: {chunk_size})"
    )
    experts.add_argument("--num-left-chunks", type=int, metavar="N", help="chunks of left context (default: -1, all)")
    add_session(experts)
    return experts


def add_search(parser: Options) -> None:
    """Options of the search; commands without them set `search` and `beam_size` as defaults."""
    parser.add_argument("--search", choices=SEARCHES, help="default: attention_rescoring if the model has a decoder")
    parser.add_argument("--beam-size", type=int, metavar="N", help="default: as in the bundle, 10 unless chosen")


def add_session(parser: Options) -> None:
    """Options of onnxruntime's sessions."""
    parser.add_argument("--providers", metavar="NAMES", help="onnxruntime execution providers, separated by commas")
    parser.add_argument("--num-threads", type=int, metavar="N", help="threads within one operator (default: 1)")


def add_words(parser: Options) -> None:
    """Options that make words more probable: hotwords and a language model."""
    parser.add_argument(
        "--hotwords",
        type=Path,
        metavar="FILE",
        help='phrases to prefer, one per line ("NAME :2.5"); none: not even those of the bundle',
    )
    parser.add_argument(
        "--lm",
        metavar="FILE[,NAME=X...]",
        help="n-gram model: ARPA, .gz, or made by 'u2moe lm'; demo: the English one of the demo model; none: not even "
        "that of the bundle. Perhaps with weight, word_bonus, unknown_score, rescoring_weight, level, as 'u2moe lm "
        "tune' prints them, or "
        "with files of words that are as probable as a word of the model: ',<name>=names.txt'",
    )


def add_channel(parser: Options) -> None:
    """The option `--channel`."""
    parser.add_argument(
        "--channel",
        type=int,
        metavar="N",
        help="use only this channel, 0 for the left one (default: the average of all)",
    )


def model_choice(args: argparse.Namespace) -> ModelChoice:
    """The model and how to decode, from the options of `add_decoding` and `add_search`.

    Raises:
        ValueError: an option is out of range, or its file cannot be read.
        LanguageModelError: the language model cannot be read.
    """
    directory = chosen_bundle(args.model)
    hotwords, language_model, text_format = words_of(args, directory)
    options = DecodingOptions(
        search=args.search,
        beam_size=args.beam_size,
        chunk_size=args.chunk_size,
        num_left_chunks=-1 if args.num_left_chunks is None else args.num_left_chunks,
        language_model=language_model,
        text_format=text_format,
    )
    return ModelChoice(
        directory=str(directory),
        settings=session_settings(args),
        options=options,
        hotwords=hotwords,
    )


def chosen_bundle(name: str | None, option: str = "--model BUNDLE") -> Path:
    """The folder of the bundle that an option names; says so if none does, and the demo model is used."""
    if name is None:
        tell(f"demo model; use {option} for another")
    return find_bundle(name)


def words_of(
    args: argparse.Namespace, directory: Path
) -> tuple[Hotwords | None, LanguageModelOptions | Literal["none"] | None, TextFormat | None]:
    """Hotwords, language model and written text, from the options of `add_words` and --format-text.

    In written text, words of hotwords and of the language model have the capitals that they have there.
    """
    hotwords = _hotwords_in(args.hotwords)
    language_model: LanguageModelOptions | Literal["none"] | None = args.lm
    if args.lm not in (None, NONE):
        language_model = language_model_options(args.lm)
    if not args.format_text:
        return hotwords, language_model, None
    used = Bundle.open(directory, verify=False).language_model() if language_model is None else language_model
    capitalized = used.model.capitalized() if isinstance(used, LanguageModelOptions) else ()
    phrases = [hotword if isinstance(hotword, str) else hotword[0] for hotword in hotwords or ()]
    mixed = [phrase for phrase in phrases if phrase not in (phrase.lower(), phrase.upper())]
    return hotwords, language_model, TextFormat(capitalized=(*capitalized, *mixed))


def session_settings(args: argparse.Namespace) -> SessionSettings:
    """Where and how the graphs run, from the options of `add_session`."""
    given = args.providers
    names = (DEFAULT_PROVIDER,) if given is None else tuple(name.strip() for name in given.split(","))
    if not all(names):
        raise ValueError(f"--providers must be names, separated by commas, got {args.providers!r}")
    return SessionSettings(providers=names, num_threads=args.num_threads)


def _hotwords_in(file: Path | None) -> Hotwords | None:
    """Hotwords in the file that --hotwords names; None: those of the bundle."""
    if file is None or str(file) == NONE:
        return None if file is None else ()
    try:
        hotwords = tuple(parse_hotwords(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    if not hotwords:
        raise ValueError(f"{file}: holds no hotwords")
    return hotwords


def language_model_options(text: str) -> LanguageModelOptions:
    """The language model in the value of --lm, such as "FILE,weight=0.4,<name>=names.txt".

    Raises:
        LanguageModelError: it cannot be read.
        ValueError: a number is out of range, or a file of words cannot be read.
    """
    found = re.fullmatch(r"(.*?)((?:,[^,=]+=[^,]*)*)", text, re.DOTALL)
    file, settings = found.groups() if found else (text, "")
    chosen: dict[str, Any] = {}
    classes: dict[str, list[str]] = {}
    for setting in settings.split(",")[1:]:
        name, _, value = setting.partition("=")
        if name in _LM_NUMBERS:
            try:
                chosen[name] = float(value)
            except ValueError as error:
                raise ValueError(f"--lm: {name} must be a number, got {value!r}") from error
        elif name == "level":
            chosen[name] = value
        else:
            classes.setdefault(name, []).extend(_words_in(name, value))
    chosen["classes"] = classes
    of_demo = Bundle.open(find_bundle(DEMO), verify=False).language_model() if file == DEMO else None
    return dataclasses.replace(of_demo, **chosen) if of_demo else LanguageModelOptions(model=file, **chosen)


def _words_in(name: str, file: str) -> list[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        expected = ", ".join((*_LM_NUMBERS, "level"))
        raise ValueError(f"--lm: found {name}={file}, expected {expected}, or WORD=FILE: {error}") from error
    return [line.strip() for line in lines if line.strip()]
