"""What `u2moe transcribe` recognises: files, folders, standard input, raw audio, and the utterances of manifests."""

from __future__ import annotations

import argparse
import functools
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, cast

from u2moe.runtime.audio.folders import find_audio
from u2moe.runtime.audio.raw import File, RawAudio
from u2moe.runtime.audio.reading import read_blocks
from u2moe.runtime.cli.terminal import complain
from u2moe.runtime.corpus.entry import AudioFile, Entry, TarMember
from u2moe.runtime.corpus.manifests import ManifestOptions, read_utterances
from u2moe.runtime.corpus.sources import Sources
from u2moe.runtime.errors import AudioError, CorpusError
from u2moe.runtime.recognizer import DEMO_FOLDER

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Blocks = Iterator[npt.NDArray[np.float32]]

STDIN = Path("-")


@dataclass(frozen=True, kw_only=True)
class Input:
    """A recording to recognise.

    Attributes:
        name: what messages and results call it.
        file: its path, if it is a file.
        place: path of its transcript in the output folder, without the suffix of the format.
        blocks: reads its samples, given a sample rate and the seconds of a block.
        transcript: what was said, if a manifest tells.
        part: what of the file it is, as JSON; empty: all.
    """

    name: str
    file: Path | None
    place: PurePath
    blocks: Callable[[int, float], Blocks]
    transcript: str | None = None
    part: tuple[float | int | None, ...] = ()

    def identity(self) -> list[Any] | None:
        """What changes if it becomes another recording, as JSON; None if that cannot be known, as of a pipe."""
        if self.file is None:
            return None
        try:
            status = self.file.stat()
        except OSError:
            return None
        return [status.st_size, status.st_mtime_ns, *self.part] if stat.S_ISREG(status.st_mode) else None


def find_inputs(args: argparse.Namespace, sources: Sources) -> tuple[list[Input], int]:
    """Everything to recognise, and the number of paths and manifests with nothing to recognise, which are reported.

    Args:
        args: `files`, `manifest`, `channel`, `track`, and `raw`, `rate` and `raw_channels`.
        sources: opens the audio of manifests.
    """
    found: list[tuple[Path, Path]] = []
    num_failed = 0
    for path in args.files or _default(args):
        try:
            files = [path] if args.raw or path == STDIN else find_audio([path])
        except AudioError as error:
            complain(str(error))
            num_failed += 1
            continue
        found += [(path if file != path else file.parent, file) for file in files]
    inputs = [_file_input(args, file, place) for file, place in _places(found).items()]
    for manifest in args.manifest or []:
        try:
            utterances = list(read_utterances(manifest, options=ManifestOptions()))
        except CorpusError as error:
            complain(str(error))
            num_failed += 1
            continue
        inputs += [_utterance_input(args, utterance, sources) for utterance in utterances]
    return inputs, num_failed


def _default(args: argparse.Namespace) -> list[Path]:
    if args.manifest:
        return []
    return [STDIN] if args.raw else [DEMO_FOLDER / "clips"]


def _file_input(args: argparse.Namespace, path: Path, place: PurePath) -> Input:
    if path == STDIN and sys.stdin is None:  # as in a service that has none
        raise ValueError("-: standard input is closed")
    file: File = cast("File", sys.stdin.buffer) if path == STDIN else path
    audio: File | RawAudio = file
    if args.raw:
        num_channels = 1 if args.raw_channels is None else args.raw_channels
        audio = RawAudio(file=file, sample_rate=args.rate, encoding=args.raw, num_channels=num_channels)
    is_ours = path.parent == DEMO_FOLDER / "clips"  # whose folder is long, and says nothing
    return Input(
        name="stdin" if path == STDIN else path.name if is_ours else str(path),
        file=None if path == STDIN else path,
        place=PurePath("stdin") if path == STDIN else place,
        blocks=functools.partial(read_blocks, audio, channel=args.channel, track=args.track),
    )


def _utterance_input(args: argparse.Namespace, utterance: Entry, sources: Sources) -> Input:
    def blocks(sample_rate: int, block_s: float) -> Blocks:
        yield from read_blocks(
            sources.open(utterance),
            sample_rate,
            block_s,
            channel=utterance.channel if args.channel is None else args.channel,
            track=args.track,
            start=utterance.start,
            end=utterance.end,
        )

    source, span = utterance.source, (utterance.start, utterance.end, utterance.channel)
    part: tuple[float | int | None, ...] = () if span == (0.0, None, None) else span
    file = Path(source.path) if isinstance(source, AudioFile) else None
    if isinstance(source, TarMember):
        file, part = Path(source.archive), (source.offset, source.size, *part)
    return Input(
        name=utterance.key,
        file=file,
        part=part,
        place=PurePath(re.sub(r"[^\w.-]", "_", utterance.key) or "_"),
        blocks=blocks,
        transcript=utterance.text,
    )


def _places(found: Sequence[tuple[Path, Path]]) -> dict[Path, PurePath]:
    """Where each file's transcript goes: folders are mirrored.

    Where two would be one, as of a.wav and a.flac, they keep their suffixes; where that is not enough, the names of
    the folders above what was searched come before them.

    Args:
        found: pairs of the folder that was searched, or in which the file lies, and the file.
    """
    roots = {file: root for root, file in found}
    places: dict[Path, PurePath] = {}
    level = 0
    while pending := [file for file in roots if file not in places]:
        proposed = {file: _proposed(roots[file], file, level) for file in pending}
        counts = Counter((*places.values(), *proposed.values()))
        most = max(len(root.absolute().parts) for root in roots.values())
        places |= {file: place for file, place in proposed.items() if counts[place] == 1 or level > 2 * most}
        level += 1
    return {file: places[file] for file in roots}


def _proposed(root: Path, file: Path, level: int) -> PurePath:
    """By level: without the suffix, with it, the same below one folder more, and so on."""
    inside = str(file.relative_to(root))
    above = [part for part in root.absolute().parts[1:] if part != ".."][-(level // 2) :] if level >= 2 else []
    return PurePath(*above) / (inside if level % 2 else inside[: len(inside) - len(file.suffix)])
