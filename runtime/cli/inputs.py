"""Inputs of commands (files, folders, standard input and raw audio), and the paths of their transcripts."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import cast

from u2moe.runtime.audio.files import find_audio
from u2moe.runtime.audio.raw import File, RawAudio
from u2moe.runtime.bundle_location import find_bundle
from u2moe.runtime.cli.options import Options
from u2moe.runtime.cli.terminal import complain
from u2moe.runtime.errors import AudioError

STDIN = Path("-")


@dataclass(frozen=True, kw_only=True)
class Input:
    """A recording to recognise."""

    name: str  # in messages and results
    file: Path  # `STDIN` for standard input
    place: PurePath  # path of the transcript relative to the output folder, without the suffix of the format
    audio: File | RawAudio


def add_channel(parser: Options) -> None:
    """Add options that select a channel and a track of a recording."""
    about = "use only this channel; 0 is the left one (default: the average)"
    parser.add_argument("--channel", type=int, metavar="N", help=about)
    about = "use this audio track of a media file, counted from 0 (default: the file's default track)"
    parser.add_argument("--track", type=int, metavar="N", help=about)


def find_inputs(args: argparse.Namespace) -> tuple[Sequence[Input], int]:
    """Return the recordings, and the number of folders without any, which stderr names. `args.raw` makes RawAudio."""
    found: list[tuple[Path, Path]] = []
    num_failed = 0
    for path in args.files or [STDIN if args.raw else find_bundle(None) / "clips"]:
        try:
            files = [path] if args.raw or path == STDIN else find_audio([path])
        except AudioError as error:
            complain(str(error))
            num_failed += 1
            continue
        found += [(path if file != path else file.parent, file) for file in files]
    inputs = []
    for path, place in _places(found).items():
        file: File = path
        name = str(path) if args.files else path.name  # omit the folder of the demo recordings: it is irrelevant
        if path == STDIN:
            if sys.stdin is None:  # some services have no standard input
                raise ValueError("-: standard input is closed")
            file, name, place = cast("File", sys.stdin.buffer), "stdin", PurePath("stdin")  # noqa: PLW2901
        inputs.append(Input(name=name, file=path, place=place, audio=args.raw(file=file) if args.raw else file))
    return inputs, num_failed


def _places(found: Sequence[tuple[Path, Path]]) -> dict[Path, PurePath]:
    """Return the relative path of each file's transcript. The paths mirror the folder structure of the files.

    If two transcripts, such as those of a.wav and a.flac, would have the same path, each keeps the suffix of its audio
    file. If that is not enough, the names of the searched folder and of folders above it are added in front.

    `found` are pairs of a folder and a file in it. The folder was searched, or is the parent of a given file.
    """
    roots = {file: root for root, file in found}
    most = max((len(root.absolute().parts) for root in roots.values()), default=0)
    places: dict[Path, PurePath] = {}
    level = 0  # odd levels keep the suffix; every second level adds a folder above
    while pending := [file for file in roots if file not in places]:
        proposed: dict[Path, PurePath] = {}
        for file in pending:
            inside = str(file.relative_to(roots[file]))
            inside = inside if level % 2 else inside[: len(inside) - len(file.suffix)]
            above = [part for part in roots[file].absolute().parts[1:] if part != ".."]
            proposed[file] = PurePath(*above[max(len(above) - level // 2, 0) :]) / inside
        counts = Counter((*places.values(), *proposed.values()))
        places |= {file: place for file, place in proposed.items() if counts[place] == 1 or level > 2 * most}
        level += 1
    return {file: places[file] for file in roots}
