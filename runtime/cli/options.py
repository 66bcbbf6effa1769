"""Options shared by several commands: model, decoding, hotwords and language model."""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any, NoReturn

from u2moe.runtime.bundle.signature import public_key
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_location import DEMO, find_bundle
from u2moe.runtime.cli.terminal import tell
from u2moe.runtime.corpus.recognition import ModelChoice
from u2moe.runtime.declarations import Option, options_of
from u2moe.runtime.decoding.context import parse_hotwords
from u2moe.runtime.language.model import FusionWeights, LanguageModelOptions
from u2moe.runtime.model.settings import DEFAULT_PROVIDER, SessionSettings
from u2moe.runtime.options import NONE, DecodingOptions
from u2moe.runtime.text.grammar import Grammar
from u2moe.runtime.text.written.formatter import LANGUAGES, TextFormat
from u2moe.runtime.validation import refused_as

FORMAT_TEXT = "--format-text"
Options = Any  # argparse has no public type for a parser or a group of its options
Hotwords = tuple[str | tuple[str, float], ...]

_TYPES = {"integer": int, "number": float, "choice": str, "text": str, "texts": str, "path": Path}


def meant(name: str, names: Iterable[str]) -> str:
    """Return the suggestion ": did you mean NAME?" for an unknown name, or "" if no name is similar."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f": did you mean {close[0]}?" if close else ""


class CommandParser(argparse.ArgumentParser):
    """Parser of a command that also has actions: `u2moe corpus LIST OUT`, and `u2moe corpus status OUT`.

    If the first argument is the name of an action, that action runs. If a file has the name of an action, write ./NAME.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.actions: dict[str, argparse.ArgumentParser] = {}

    def add_action(self, name: str, description: str | None) -> argparse.ArgumentParser:
        """Add an action. Return its parser."""
        action = self.actions[name] = argparse.ArgumentParser(prog=f"{self.prog} {name}", description=description)
        action.set_defaults(parser=action)
        return action

    def error(self, message: str) -> NoReturn:
        """End the program with exit status 2. If a choice is unknown, suggest a similar one."""
        found = re.search(r"invalid choice: '(.+)' \(choose from (.+)\)", message)
        super().error(message + (meant(found[1], re.findall(r"[\w-]+", found[2])) if found else ""))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Return the parsed options, and the unknown arguments."""
        args = [  # the language after --format-text is optional, even if a file name follows
            f"{each}=en" if each == FORMAT_TEXT and not {*args[place + 1 : place + 2]} & {*LANGUAGES} else each
            for place, each in enumerate(args or ())
        ]
        if args and args[0] in self.actions:
            return self.actions[args[0]].parse_known_args(args[1:], namespace)
        return super().parse_known_args(args, namespace)


def add_model(parser: Options) -> None:
    """Add the option `--model`."""
    about = "folder of a bundle, or org/name[@revision] on the Hugging Face hub (default: demo, the demo model)"
    parser.add_argument("--model", metavar="BUNDLE", help=about)


def add_decoding(parser: Options, chunk_size: str) -> Options:
    """Add options for model and decoding; `chunk_size` is the default to show. Return the group "for experts"."""
    add_model(parser)
    add_words(parser)
    experts = parser.add_argument_group("for experts")
    add_declared(experts, DecodingOptions, chunk_size=chunk_size)
    add_session(experts)
    return experts


def add_declared(parser: Options, kind: Any, only: Container[str] | None = None, **otherwise: str) -> None:
    """Add an option for each dataclass field that declares a flag. `only`: names of the fields to use; None: all."""
    for name, declared in _with_flags(kind).items():
        if only is not None and name not in only:
            continue
        default = otherwise.get(name) or declared.otherwise or declared.default
        default = f"{default:g}" if isinstance(default, float) else default
        shown = f"as in the bundle, else {default}" if declared.in_bundle else default
        about = declared.about.replace("%", "%%")  # argparse formats help texts
        if declared.kind == "flag":
            parser.add_argument(declared.flag, dest=name, action="store_true", help=about)
            continue
        is_list = declared.kind == "texts"
        more: dict[str, Any] = {"action": "append"} if is_list else {"choices": declared.choices or None}
        more["help"] = f"{about}{'; may be repeated' * is_list} (default: {shown})"
        parser.add_argument(declared.flag, dest=name, type=_TYPES[declared.kind], metavar=declared.metavar, **more)


def declared_in(args: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """Return the values of `add_declared` options that were given on the command line, by field name."""
    return {name: value for name in _with_flags(kind) if (value := getattr(args, name, None)) is not None}


def _with_flags(kind: Any) -> dict[str, Option]:
    return {name: each for name, each in options_of(kind).items() if each.flag is not None and each.kind != "record"}


def add_session(parser: Options) -> None:
    """Add the options for onnxruntime sessions."""
    parser.add_argument("--providers", metavar="NAMES", help="onnxruntime execution providers, separated by commas")
    parser.add_argument("--num-threads", type=int, metavar="N", help="threads within one operator (default: 1)")
    add_public_key(parser)


def add_public_key(parser: Options) -> None:
    """Add the option `--public-key`."""
    about = "accept only bundles signed by this key (PEM; see 'u2moe sign'); may be repeated for other keys"
    parser.add_argument("--public-key", metavar="FILE", type=Path, action="append", help=about)


def public_keys_in(args: argparse.Namespace) -> tuple[str, ...] | None:
    """Return the keys in the files of --public-key. None: bundles need no signature."""
    if (files := getattr(args, "public_key", None)) is None:
        return None
    texts = {file: file.read_text(encoding="utf-8", errors="replace") for file in files}
    for file, text in texts.items():
        with refused_as(ValueError, file):
            public_key(text)
    return tuple(texts.values())


def add_words(parser: Options) -> None:
    """Add the options for hotwords, a grammar, a language model and text formatting."""
    about = (
        'phrases to prefer, one per line, optionally with a weight ("NAME :2.5"); "none" disables all hotwords, '
        "including those of the bundle"
    )
    parser.add_argument("--hotwords", type=Path, metavar="FILE", help=about)
    about = (
        'allowed phrases, one per line, such as "lights (on | off)"; "[unk]" allows other speech, and '
        '"<slot> = a | b" defines a slot'
    )
    parser.add_argument("--grammar", type=Path, metavar="FILE", help=about)
    about = (
        "n-gram model: ARPA (plain or .gz), or made by 'u2moe lm'; demo: the demo model's, for English; none: no "
        f"model, not even the bundle's. Settings may follow: {', '.join(options_of(FusionWeights))} (as printed by "
        "'u2moe lm tune'), and <name>=names.txt, which divides the probability of the model's word <name> among the "
        "words of that file"
    )
    parser.add_argument("--lm", metavar="FILE[,NAME=X...]", help=about)
    about = (
        "write numbers in this language (en if none is named) as digits, and English in sentence case; zh and ja "
        "need the extra [written]"
    )
    parser.add_argument(FORMAT_TEXT, choices=LANGUAGES, help=about)


def decoding_choice(
    args: argparse.Namespace, directory: Path, kind: Any = DecodingOptions
) -> tuple[DecodingOptions, Hotwords | None]:
    """Return decoding options and hotwords from the parsed command line, for the bundle in `directory`.

    With --format-text, capitals in hotwords and in the language model also appear in the text. Raise LanguageModelError
    if the model cannot be read, and ValueError if another file cannot be read or an option is out of range.
    """
    hotwords: Hotwords | None = None if args.hotwords is None else ()
    if args.hotwords is not None and str(args.hotwords) != NONE:
        try:
            hotwords = tuple(parse_hotwords(args.hotwords.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(f"{args.hotwords}: {error}") from error
        if not hotwords:
            raise ValueError(f"{args.hotwords}: contains no hotwords")
    chosen = declared_in(args, kind)
    if args.grammar is not None:
        with refused_as(ValueError, args.grammar):
            chosen["grammar"] = Grammar.parse(args.grammar.read_text(encoding="utf-8"))
    if args.lm is not None:
        chosen["language_model"] = NONE if args.lm == NONE else language_model_options(args.lm)
    if args.format_text:
        bundle = Bundle.open(directory, verify=False, public_keys=public_keys_in(args))
        used = chosen.get("language_model") or bundle.language_model()
        capitalized = used.model.capitalized() if isinstance(used, LanguageModelOptions) else ()
        phrases = [hotword if isinstance(hotword, str) else hotword[0] for hotword in hotwords or ()]
        mixed = [phrase for phrase in phrases if phrase not in (phrase.lower(), phrase.upper())]
        chosen["text_format"] = TextFormat(language=args.format_text, capitalized=(*capitalized, *mixed))
    return DecodingOptions(**chosen), hotwords


def model_choice(args: argparse.Namespace, directory: Path | None = None, kind: Any = DecodingOptions) -> ModelChoice:
    """Return what the options of `add_decoding` select, by default for --model. For errors, see `decoding_choice`."""
    directory = directory or chosen_bundle(args.model)
    options, hotwords = decoding_choice(args, directory, kind)
    keys = public_keys_in(args)
    settings = SessionSettings(providers=providers_in(args), num_threads=args.num_threads, public_keys=keys)
    return ModelChoice(directory=str(directory), settings=settings, options=options, hotwords=hotwords)


def providers_in(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the names in --providers, or the default provider. Raise ValueError if a name is empty."""
    providers = (DEFAULT_PROVIDER,) if args.providers is None else tuple(map(str.strip, args.providers.split(",")))
    if not all(providers):
        raise ValueError(f"--providers must be names separated by commas, got {args.providers!r}")
    return providers


def chosen_bundle(name: str | None, option: str = "--model BUNDLE") -> Path:
    """Return the folder of the bundle that an option names. Without a name, report that the demo model is used."""
    if name is None:
        tell(f"demo model; use {option} for another")
    return find_bundle(name)


def language_model_options(text: str) -> LanguageModelOptions:
    """Parse --lm, such as "FILE,weight=0.4,<name>=names.txt". Raise LanguageModelError or ValueError."""
    found = re.fullmatch(r"(.*?)((?:,[^,=]+=[^,]*)*)", text, re.DOTALL)
    file, settings = found.groups() if found else (text, "")
    classes: dict[str, list[str]] = {}
    chosen: dict[str, Any] = {"classes": classes}
    for setting in settings.split(",")[1:]:
        name, _, value = setting.partition("=")
        declared = options_of(FusionWeights).get(name)
        if declared is not None:
            try:
                chosen[name] = _TYPES[declared.kind](value)
            except ValueError as error:
                raise ValueError(f"--lm: {name} must be a number, got {value!r}") from error
            continue
        try:
            lines = Path(value).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            expected = f"a setting ({', '.join(options_of(FusionWeights))}) or WORD=FILE"
            raise ValueError(f"--lm: found {setting}, expected {expected}: {error}") from error
        classes.setdefault(name, []).extend(line.strip() for line in lines if line.strip())
    of_demo = Bundle.open(find_bundle(DEMO), verify=False).language_model() if file == DEMO else None
    return dataclasses.replace(of_demo, **chosen) if of_demo else LanguageModelOptions(model=file, **chosen)
