"""A folder of transcripts with a record of how each was made, so that a second run redoes only what has changed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from u2moe.runtime.cli.inputs import Input
from u2moe.runtime.cli.terminal import escaped
from u2moe.runtime.errors import U2moeError
from u2moe.runtime.whole_file import failures_named, probe, remove_stale_parts, write_bytes

RECORDS = ".u2moe.jsonl"
"""One line per written transcript: its name and digest, how it was made, and from which recording."""

State = Literal["missing", "done", "outdated", "foreign"]


class TranscriptFolder:
    """A folder for transcripts; several processes may write to it at once.

    Args:
        folder: created if missing.
        file_format: name of the format, also the suffix of the files.
        inputs: recordings with distinct places.

    Raises:
        ValueError: two recordings would be written to the same file.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, file_format: str, inputs: Sequence[Input]) -> None:
        self.folder = folder
        self._format = file_format
        for output, count in Counter(map(self.output_of, inputs)).items():
            if count > 1:
                raise ValueError(
                    f"{count} recordings would be written to {output}: rename them, or recognise them separately"
                )
        folder.mkdir(parents=True, exist_ok=True)
        for place in {folder, *(self.output_of(item).parent for item in inputs)}:
            remove_stale_parts(place)
        probe(folder)
        self._records = self._read_records()

    def output_of(self, recording: Input) -> Path:
        """The file for the transcript of a recording."""
        return self.folder / f"{recording.place}.{self._format}"

    def partial_of(self, recording: Input) -> Path:
        """The file for an incomplete transcript of a recording."""
        return self.folder / f"{recording.place}.{self._format}.partial"

    def text_of(self, recording: Input) -> str | None:
        """The text of a transcript that is there; None: this format does not tell, or there is none."""
        try:
            content = self.output_of(recording).read_text(encoding="utf-8", errors="surrogateescape")
            if self._format == "json":
                return str(json.loads(content)["text"])
        except (OSError, ValueError, LookupError):
            return None
        return " ".join(content.splitlines()) if self._format == "txt" else None

    def state_of(self, recording: Input, made_by: Any) -> State:
        """Whether there is a transcript, made in the same way from the present recording.

        `made_by` describes everything that affects a transcript besides the recording, such as model and options, as
        JSON. "foreign": it was not written here, or has been edited since. What comes from a pipe is never "done".
        """
        try:
            content = self.output_of(recording).read_bytes()
        except (OSError, ValueError):  # missing, or what writing will say of this file alone
            return "missing"
        digest = hashlib.sha256(content).hexdigest()
        records = [record for record in self._records[self._name_of(recording)] if record.get("sha256") == digest]
        if not records:
            return "foreign"
        now = _record(recording, made_by)
        is_known = now["recording"] is not None
        return "done" if is_known and now in map(_without_output, records) else "outdated"

    def _name_of(self, recording: Input) -> str:
        """The name of an output in records."""
        return self.output_of(recording).relative_to(self.folder).as_posix()

    def write(self, recording: Input, content: str, made_by: Any) -> None:
        """Write a complete transcript atomically.

        Raises:
            U2moeError: it cannot be written; names the file.
        """
        encoded, output = _encoded(content, self._format), self.output_of(recording)
        record = {"output": self._name_of(recording), "sha256": hashlib.sha256(encoded).hexdigest()}
        record |= _record(recording, made_by)
        with _own_failures():
            # The record comes first and counts only for a file with the same content, so no file lacks one.
            # Records are not flushed: a transcript that lost its own in a power failure is whole, and kept as foreign.
            with failures_named(output), (self.folder / RECORDS).open("ab") as records:
                records.write(b"\n" + json.dumps(record).encode() + b"\n")
            _replace(output, encoded)
            with contextlib.suppress(OSError):
                self.partial_of(recording).unlink()

    def write_partial(self, recording: Input, content: str) -> Path:
        """Write an incomplete transcript under a name that says so. Returns the file."""
        partial = self.partial_of(recording)
        with _own_failures():
            _replace(partial, _encoded(content, self._format))
        return partial

    def _read_records(self) -> defaultdict[str, list[dict[str, Any]]]:
        """Records of all files written here, by their names; ignores a line left unfinished by a killed process."""
        records = defaultdict[str, list[dict[str, Any]]](list)
        try:
            lines = (self.folder / RECORDS).read_bytes().splitlines()
        except FileNotFoundError:
            return records
        for line in lines:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    records[str(record.get("output"))].append(record)
        return records


def try_to_write(file: Path | None) -> None:
    """Check before long work whether its report can be written to `file`, without changing it.

    Raises:
        OSError: it cannot be written.
    """
    if file is None:
        return
    existed = file.exists()
    with file.open("ab"):
        pass
    if not existed:
        file.unlink()


def _record(recording: Input, made_by: Any) -> dict[str, Any]:
    """How a transcript was made, with data to detect a changed recording."""
    return {"made_by": json.loads(json.dumps(made_by)), "recording": recording.identity()}


def _without_output(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record.get(name) for name in ("made_by", "recording")}


def _encoded(content: str, file_format: str) -> bytes:
    """The encoded content of a file; the name of a recording in it may not be valid text."""
    if file_format == "json":
        with contextlib.suppress(UnicodeEncodeError):
            return content.encode()
        return escaped(content).encode()
    return content.encode("utf-8", "surrogateescape")


def _replace(file: Path, content: bytes) -> None:
    with failures_named(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, content, is_lasting=False)  # if the old one is back after a power failure, it is outdated


@contextlib.contextmanager
def _own_failures() -> Iterator[None]:
    """What fails for one file is an U2moeError, unless the next file would also fail."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise U2moeError(str(error)) from error
