"""Parquet files of Hugging Face data sets: column `audio` (bytes or paths), and optional transcripts. Needs pyarrow."""

from collections.abc import Iterator, Mapping
from typing import Any

from u2moe.runtime.corpus.entry import AudioBytes, AudioSource, Entry, ListOptions, Unreadable
from u2moe.runtime.corpus.storage import open_binary
from u2moe.runtime.errors import CorpusError

_ROWS = 16  # number of rows, including their audio, in memory at once
_TEXTS = ("text", "sentence", "transcription", "transcript", "normalized_text")
_KEYS = ("key", "id", "segment_id")


def read(list_path: str, options: ListOptions) -> Iterator[Entry]:
    """Yield the entries of a Parquet file. Keys are those in a column of `_KEYS`, or row numbers. Raise CorpusError."""
    import pyarrow as pa  # noqa: PLC0415 - an extra
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        with open_binary(list_path) as stream:
            file = pq.ParquetFile(stream)
            if "audio" not in file.schema_arrow.names:
                raise CorpusError(f"{list_path}: found columns {', '.join(file.schema_arrow.names)}, but not audio")
            records = (record for batch in file.iter_batches(_ROWS) for record in batch.to_pylist())
            for number, record in enumerate(records):
                yield _entry(number, record, list_path, options)
    except pa.ArrowInvalid as error:
        raise CorpusError(f"{list_path}: cannot be read as Parquet: {error}") from error


def count_rows(list_path: str) -> int:
    """Return the number of rows. Only the end of the file is read."""
    import pyarrow.parquet as pq  # noqa: PLC0415

    with open_binary(list_path) as stream:
        return int(pq.ParquetFile(stream).metadata.num_rows)


def _entry(number: int, record: Mapping[str, Any], list_path: str, options: ListOptions) -> Entry:
    found = {name: record[name] for name in (*_KEYS, *_TEXTS) if record.get(name) is not None}
    key = next((str(found[name]) for name in _KEYS if name in found), str(number))
    text = next((str(found[name]) for name in _TEXTS if name in found), None)
    speaker = record.get("speaker_id", record.get("speaker"))
    other = record.keys() - {"audio", "speaker", "speaker_id", *_KEYS, *_TEXTS}
    fields = {name: value for name, value in record.items() if name in other and isinstance(value, str | int | float)}
    source, speaker = _source(record["audio"], key, list_path, options), None if speaker is None else str(speaker)
    return Entry(key=key, source=source, text=text, speaker=speaker, fields=fields)


def _source(audio: Any, key: str, list_path: str, options: ListOptions) -> AudioSource:
    found = audio if isinstance(audio, Mapping) else {"path": audio}
    if isinstance(found.get("bytes"), bytes):
        return AudioBytes(content=found["bytes"], name=f"{list_path}: {found.get('path') or key}")
    if isinstance(found.get("path"), str):
        return options.source(found["path"], list_path)
    return Unreadable(error=f"{list_path}: {key}: audio contains neither bytes nor a path")
