"""Recognises the entries of a block. Short entries are decoded in batches."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from u2moe.runtime.corpus.entry import Block, Entry, Sources
from u2moe.runtime.corpus.rows import Row, RowMaker, as_line, duration_of
from u2moe.runtime.corpus.run_folder import OutputFolder
from u2moe.runtime.errors import AlignmentError, AudioError, handing_warnings_to
from u2moe.runtime.model.settings import DEFAULT_PROVIDER, SessionSettings
from u2moe.runtime.options import DecodingOptions
from u2moe.runtime.recognition import RecordingReader, recognize, transcript_of
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.result import Result, Transcript
from u2moe.runtime.stream import Stream


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """A bundle, and how to decode with it.

    Attributes:
        directory: folder of the bundle; None: the demo model.
        settings: session settings. `sess_options` must be None, because other processes cannot receive them.
        options: how to decode.
        hotwords: phrases to prefer, with or without weights. None: the hotwords of the bundle.
    """

    directory: str | None = None
    settings: SessionSettings = field(default_factory=SessionSettings)
    options: DecodingOptions = field(default_factory=DecodingOptions)
    hotwords: tuple[str | tuple[str, float], ...] | None = None

    def load(self) -> Recognizer:
        """Load a recogniser. For errors, see `Recognizer.load`."""
        hotwords = list(self.hotwords) if self.hotwords is not None else None
        return Recognizer.load(self.directory, self.settings, options=self.options, hotwords=hotwords)

    @property
    def can_be_forked(self) -> bool:
        """Whether forked processes can use the loaded model: only on the CPU and with one thread."""
        return self.settings.providers == (DEFAULT_PROVIDER,) and self.num_threads == 1

    @property
    def num_threads(self) -> int:
        """Number of threads within one operator."""
        return self.settings.num_threads or 1

    @property
    def hotwords_digest(self) -> str | None:
        """SHA-256 of the hotwords. None: the hotwords of the bundle are used."""
        return None if self.hotwords is None else hashlib.sha256(json.dumps(self.hotwords).encode()).hexdigest()


LONGEST_BATCHED_S = 30.0
"""Longest entry in seconds that is decoded in a batch. To limit memory, others are decoded while they are read."""
BATCH_LEN = 64
_BATCH_S = 300.0
"""A batch is decoded when it has `BATCH_LEN` entries, or more than this many seconds of audio. The pipeline sorts the
entries of a batch by length."""


@dataclass(kw_only=True)
class Caution:
    """How to repeat a block after worker processes died; see `pool`. Entries are indices in the block."""

    left_out: dict[int, str] = field(default_factory=dict)  # entries to skip, and why
    alone: set[int] = field(default_factory=set)  # entries to decode separately
    deaths: Counter[tuple[int, ...]] = field(default_factory=Counter)  # of processes, by the entries they worked on


@dataclass(frozen=True)
class _Read:
    """An entry after its audio was read. `stream` contains the audio that is not decoded yet."""

    index: int
    entry: Entry
    stream: Stream
    segments: list[Result]
    duration: float
    error: AudioError | None
    warnings: Sequence[str]


class BlockRecognizer:
    """Recognises blocks. Batches depend only on the block, so a repeated block produces the same rows.

    With `align`, the transcript of each entry is aligned with its audio, which is not recognised. `on_progress` gets
    the number of entries and the seconds of audio recognised since the last call, and `on_attempt` the indices of at
    most `BATCH_LEN` entries before they are read or decoded.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        rows: RowMaker,
        *,
        align: bool = False,
        on_progress: Callable[[int, float], object] = lambda _num, _seconds: None,
        on_attempt: Callable[[Sequence[int]], object] = lambda _indices: None,
    ) -> None:
        self._recognizer, self._rows, self._align = recognizer, rows, align
        self._on_progress, self._on_attempt = on_progress, on_attempt
        self._sample_rate = recognizer.bundle.manifest.features.sample_rate

    def recognize(self, entries: Sequence[Entry], caution: Caution | None = None) -> list[Row]:
        """Return a row for each entry, in order. Entries that cannot be recognised have an `error`."""
        caution = caution or Caution()
        rows: dict[int, Row] = {}
        waiting: list[_Read] = []
        with Sources() as sources:
            for index, entry in enumerate(entries):
                if index in caution.left_out:
                    rows[index] = self._failed(entry, caution.left_out[index])
                elif index in caution.alone or self._align:
                    rows[index] = self._alone(index, entry, sources)
                else:
                    try:
                        waiting.append(self._read(index, entry, sources))
                    except Exception as error:  # noqa: BLE001 - one bad file must not stop the others
                        rows[index] = self._failed(entry, error)
                is_full = len(waiting) == BATCH_LEN or sum(read.duration for read in waiting) > _BATCH_S
                if is_full or index + 1 == len(entries):
                    rows |= self._decode(waiting, sources)
                    waiting.clear()
        return [rows[index] for index in range(len(entries))]

    def _read(self, index: int, entry: Entry, sources: Sources) -> _Read:
        """Read the audio of an entry. A long entry is recognised while it is being read."""
        self._on_attempt([index])
        warnings: dict[str, None] = {}  # an ordered set
        with handing_warnings_to(warnings.setdefault):
            reader = RecordingReader(sources.read_blocks(entry, self._sample_rate), self._sample_rate)
            stream = self._recognizer.create_recording_stream()

            def decode(streams: list[Stream]) -> None:
                if reader.duration > LONGEST_BATCHED_S and not reader.has_ended:
                    self._recognizer.decode_streams(streams)

            segments = list(recognize(decode, stream, reader))
        return _Read(index, entry, stream, segments, reader.duration, reader.error, list(warnings))

    def _decode(self, reads: Sequence[_Read], sources: Sources) -> dict[int, Row]:
        """Decode entries together. If that fails, decode each separately."""
        self._on_attempt([read.index for read in reads])
        try:
            self._recognizer.decode_streams([read.stream for read in reads])
        except Exception:  # noqa: BLE001 - one entry caused it, so try each separately
            return {read.index: self._alone(read.index, read.entry, sources) for read in reads}
        rows = {read.index: self._row(read) for read in reads}
        self._on_progress(len(reads), sum(read.duration for read in reads))
        return rows

    def _alone(self, index: int, entry: Entry, sources: Sources) -> Row:
        try:
            if self._align:
                if not entry.text:
                    raise AlignmentError("the list contains no transcript for this utterance")  # noqa: TRY301
                self._on_attempt([index])
                warnings: dict[str, None] = {}
                with handing_warnings_to(warnings.setdefault):
                    alignment = self._recognizer.align(sources.read_blocks(entry, self._sample_rate), entry.text)
                row = self._rows.of_transcript(entry, alignment, [*warnings, *alignment.warnings])
            else:
                read = self._read(index, entry, sources)
                self._recognizer.decode_streams([read.stream])
                row = self._row(read)
        except Exception as error:  # noqa: BLE001 - one bad file must not stop the others
            return self._failed(entry, error)
        self._on_progress(1, duration_of(row))
        return row

    def _row(self, read: _Read) -> Row:
        transcript = transcript_of(read.segments + read.stream.take_segments(), read.duration, read.error)
        return self._rows.of_transcript(read.entry, transcript, read.warnings)

    def _failed(self, entry: Entry, error: Exception | str) -> Row:
        self._on_progress(1, 0.0)
        message = " ".join(str(error).split()) or type(error).__name__
        return self._rows.of_transcript(entry, Transcript(text="", duration=0.0, segments=[], error=message))


@dataclass(frozen=True, kw_only=True)
class BlockDone:
    """Statistics of the block with index `number`, whose results are written: entries, and seconds of their audio."""

    number: int
    num_utterances: int
    num_failed: int  # with an error
    num_warned: int  # with warnings
    seconds: float


def write_block(folder: OutputFolder, block: Block, rows: Sequence[Row]) -> BlockDone:
    """Write the rows of a block. The block is then finished. Raise OSError if the file cannot be written."""
    folder.write_block(block, b"".join(map(as_line, rows)))
    num_failed, num_warned = sum(row["error"] is not None for row in rows), sum("warnings" in row for row in rows)
    return BlockDone(
        number=block.number,
        num_utterances=len(rows),
        num_failed=num_failed,
        num_warned=num_warned,
        seconds=sum(map(duration_of, rows)),
    )
