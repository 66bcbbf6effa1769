"""What a process that works on a run does with a block: recognise it and write its file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from u2moe.runtime.corpus.block_recognizer import BlockRecognizer, Caution
from u2moe.runtime.corpus.blocks import Block
from u2moe.runtime.corpus.output_folder import OutputFolder
from u2moe.runtime.corpus.rows import Row, RowMaker, changed_options, decode_rows, encode_rows
from u2moe.runtime.corpus.run_description import RunDescription
from u2moe.runtime.recognizer import Recognizer


@dataclass(frozen=True, kw_only=True)
class BlockDone:
    """A block was recognised and written.

    Attributes:
        number: the block.
        num_utterances: its utterances.
        num_failed: those with an error.
        num_warned: those with warnings.
    """

    number: int
    num_utterances: int
    num_failed: int
    num_warned: int


class BlockWriter:
    """Recognises blocks of a run and writes their files.

    Args:
        folder: the folder of the run, already begun.
        run: its description.
        recognizer: a recogniser with the run's model and options.
        on_progress: see `BlockRecognizer`.
        on_attempt: see `BlockRecognizer`.
    """

    def __init__(
        self,
        folder: OutputFolder,
        run: RunDescription,
        recognizer: Recognizer,
        *,
        on_progress: Callable[[int, float], object] = lambda _num, _seconds: None,
        on_attempt: Callable[[Sequence[int]], object] = lambda _indices: None,
    ) -> None:
        self._folder = folder
        self._format = run.output_format
        rows = RowMaker(model=run.model, options=changed_options(run.options), is_nemo=run.list_format == "nemo")
        self._recognizer = BlockRecognizer(recognizer, rows, on_progress=on_progress, on_attempt=on_attempt)

    def write(self, block: Block, caution: Caution | None = None) -> BlockDone:
        """Recognise a block and write its file.

        Raises:
            OSError: the file cannot be written.
        """
        rows = self._recognizer.recognize(block.utterances, caution)
        self._folder.write_block(block, encode(rows, self._format), self._format)
        num_failed = sum(row["error"] is not None for row in rows)
        num_warned = sum("warnings" in row for row in rows)
        return BlockDone(number=block.number, num_utterances=len(rows), num_failed=num_failed, num_warned=num_warned)


def encode(rows: Iterable[Row], output_format: str) -> bytes:
    """Rows as the content of a file; "parquet" needs pyarrow."""
    if output_format == "jsonl":
        return encode_rows(rows)
    from u2moe.runtime.corpus import parquet  # noqa: PLC0415 - an extra

    return parquet.encode_rows(rows)


def decode(content: bytes, output_format: str) -> Iterator[Row]:
    """Rows from the content of a file; "parquet" needs pyarrow."""
    if output_format == "jsonl":
        return decode_rows(content)
    from u2moe.runtime.corpus import parquet  # noqa: PLC0415 - an extra

    return parquet.decode_rows(content)
