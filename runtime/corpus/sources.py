"""The samples of an utterance, wherever its audio lies: in a file, behind a URL, in a tar archive, from a command."""

from __future__ import annotations

import contextlib
import gzip
import subprocess
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, Self

from u2moe.runtime.audio import read_blocks
from u2moe.runtime.corpus.storage import is_url, open_binary
from u2moe.runtime.corpus.utterance import AudioBytes, AudioFile, Command, TarMember, Utterance
from u2moe.runtime.errors import AudioError
from u2moe.runtime.sound_file import SoundBytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_GZIP = b"\x1f\x8b"
_LONGEST_COMPLAINT = 200


class Sources:
    """Reads the audio of utterances. Keeps one compressed archive open: its members are read in order, in one pass.

    Close it, or use it in a `with` block.
    """

    def __init__(self) -> None:
        self._archive = ""
        self._opened = contextlib.ExitStack()
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def read_blocks(self, utterance: Utterance, sample_rate: int) -> Iterator[npt.NDArray[np.float32]]:
        """Samples of an utterance at `sample_rate`, one channel, float32, in blocks of about ten seconds.

        Raises:
            AudioError: its audio cannot be read, or breaks off; then raised after the last samples.
        """
        yield from read_blocks(
            self.open(utterance),
            sample_rate,
            channel=utterance.channel,
            start=utterance.start,
            end=utterance.end,
        )

    def open(self, utterance: Utterance) -> str | SoundBytes:
        """The sound file of an utterance: a path, or its bytes.

        Raises:
            AudioError: it cannot be read; names it.
        """
        source = utterance.source
        try:
            if isinstance(source, AudioFile) and not is_url(source.path):
                return source.path
            if isinstance(source, AudioFile):
                with open_binary(source.path) as stream:
                    return SoundBytes(stream.read(), source.path)
            if isinstance(source, AudioBytes):
                return SoundBytes(source.content, source.name)
            if isinstance(source, TarMember):
                return SoundBytes(self._member(source), str(source))
            if isinstance(source, Command):
                return SoundBytes(_output_of(source.command), str(source))
        except AudioError:
            raise
        except Exception as error:  # of fsspec's file systems, which raise errors of their own
            raise AudioError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        raise AudioError(source.error)

    def _member(self, member: TarMember) -> bytes:
        if self._archive != member.archive or self._stream is None:
            self._opened.close()
            self._stream = self._open_archive(member.archive)
            self._archive = member.archive
        self._stream.seek(member.offset)
        content = self._stream.read(member.size)
        if len(content) < member.size:
            raise AudioError(f"{member}: the archive breaks off")
        return content

    def _open_archive(self, archive: str) -> Any:
        stream = self._opened.enter_context(open_binary(archive))
        is_compressed = stream.read(2) == _GZIP
        stream.seek(0)
        return self._opened.enter_context(gzip.GzipFile(fileobj=stream)) if is_compressed else stream


def _output_of(command: str) -> bytes:
    """What a shell command writes to its standard output."""
    run = subprocess.run(  # noqa: S602 - the caller allowed the commands of this manifest
        command, shell=True, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if run.returncode or not run.stdout:
        complaint = run.stderr.decode(errors="replace").strip()[-_LONGEST_COMPLAINT:]
        raise AudioError(f"{command}: ended with status {run.returncode}, {len(run.stdout)} bytes: {complaint}")
    return run.stdout
