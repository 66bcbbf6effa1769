"""Options shared by several sub-commands: the model, and how to decode."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from u2moe.runtime.cli.language_model import add_language_model, language_model_options
from u2moe.runtime.decoding.context import parse_hotwords
from u2moe.runtime.language.model import LanguageModelOptions
from u2moe.runtime.model.native import KERNELS, VARIABLE
from u2moe.runtime.model.settings import SessionSettings
from u2moe.runtime.options import SEARCHES, DecodingOptions, EndpointConfig
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.text.written.formatter import TextFormat

Subparsers = Any  # argparse has no public name for it


def add_decoding(parser: argparse.ArgumentParser, *, chunk_size: str) -> None:
    """Options for model and decoding; `chunk_size` describes the default chunk size."""
    parser.add_argument("--model", type=Path, metavar="BUNDLE", help="folder of a bundle")
    parser.add_argument("--chunk-size", type=int, metavar="N", help=f"encoder frames per chunk (default: {chunk_size})")
    parser.add_argument("--left-chunks", type=int, metavar="N", help="chunks of left context (default: -1, all)")
    parser.add_argument("--search", choices=SEARCHES, help="default: attention_rescoring if the model has a decoder")
    parser.add_argument("--beam-size", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument(
        "--ctc-weight", type=float, metavar="X", help="weight of the first pass (default: from the bundle)"
    )
    parser.add_argument("--reverse-weight", type=float, metavar="X", help="weight of the right-to-left decoder, 0 to 1")
    add_padding(parser)
    parser.add_argument("--providers", metavar="NAMES", help="onnxruntime execution providers, separated by commas")
    parser.add_argument("--num-threads", type=int, metavar="N", help="threads within one operator (default: 1)")
    add_kernels(parser)
    parser.add_argument("--hotwords", type=Path, metavar="FILE", help='phrases to prefer, one per line ("NAME :2.5")')
    group = parser.add_argument_group("written text")
    group.add_argument("--format-text", action="store_true", help="English: digits for numbers, small letters")
    group.add_argument(
        "--capitalized", type=Path, metavar="FILE", help="further words that --format-text writes with capitals"
    )
    add_language_model(parser)


def add_padding(parser: argparse.ArgumentParser) -> None:
    """The option `--padding`."""
    parser.add_argument(
        "--padding",
        type=float,
        metavar="S",
        help="seconds of silence around audio that is cut off in a sound (default: from the bundle)",
    )


def add_channel(parser: argparse.ArgumentParser) -> None:
    """The option `--channel`."""
    parser.add_argument(
        "--channel",
        type=int,
        metavar="N",
        help="use only this channel, 0 for the left one (default: the average of all)",
    )


def add_kernels(parser: argparse.ArgumentParser) -> None:
    """The option `--kernels`."""
    parser.add_argument(
        "--kernels",
        choices=KERNELS,
        help=f"native: those of u2moe-kernels; auto: these where they are installed (default: ${VARIABLE} or auto)",
    )


def given_options(args: argparse.Namespace, parser: argparse.ArgumentParser, names: Iterable[str]) -> list[str]:
    """Those of the options, as "--beam-size", whose value is not the default."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) != parser.get_default(name)]


def named_path(text: str) -> Path:
    """A path that is not empty, as an unset variable of a shell script is: it would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("a name is empty")
    return Path(text)


def make_recognizer(args: argparse.Namespace) -> Recognizer:
    """The recogniser for the options."""
    options, hotwords = decoding_options(args), hotwords_of(args)
    return Recognizer.load(args.model, session_settings(args), options=options, hotwords=hotwords)


def session_settings(args: argparse.Namespace) -> SessionSettings:
    """Where and how the graphs run."""
    return SessionSettings(providers=_provider_names(args), num_threads=args.num_threads, kernels=args.kernels)


def decoding_options(args: argparse.Namespace) -> DecodingOptions:
    """How to decode."""
    language_model = language_model_options(args)
    return DecodingOptions(
        search=args.search,
        beam_size=args.beam_size,
        ctc_weight=args.ctc_weight,
        reverse_weight=args.reverse_weight,
        chunk_size=args.chunk_size,
        num_left_chunks=-1 if args.left_chunks is None else args.left_chunks,
        endpoint=EndpointConfig(),
        language_model=language_model,
        padding_s=args.padding,
        text_format=_text_format(args, language_model),
    )


def _text_format(args: argparse.Namespace, language_model: LanguageModelOptions | None) -> TextFormat | None:
    if not args.format_text:
        if args.capitalized:
            raise ValueError("--capitalized needs --format-text")
        return None
    try:
        lines = args.capitalized.read_text(encoding="utf-8-sig").splitlines() if args.capitalized else []
    except (OSError, ValueError) as error:
        raise ValueError(f"{args.capitalized}: {error}") from error
    known = language_model.model.capitalized() if language_model else ()
    return TextFormat(capitalized=(*known, *(line.strip() for line in lines if line.strip())))


def _provider_names(args: argparse.Namespace) -> tuple[str, ...] | None:
    """Execution providers, separated by commas; None: the default."""
    if args.providers is None:
        return None
    names = tuple(name.strip() for name in args.providers.split(","))
    if not all(names):
        raise ValueError(f"--providers must be names, separated by commas, got {args.providers!r}")
    return names


def hotwords_of(args: argparse.Namespace) -> tuple[str | tuple[str, float], ...] | None:
    """Hotwords in the file that --hotwords names; None: there is none."""
    if not args.hotwords:
        return None
    try:
        hotwords = tuple(parse_hotwords(args.hotwords.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{args.hotwords}: {error}") from error
    if not hotwords:
        raise ValueError(f"{args.hotwords}: holds no hotwords")
    return hotwords
