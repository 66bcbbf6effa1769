"""Results as Parquet files. All list formats except NeMo's give the same columns. Needs pyarrow (extra `parquet`)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from u2moe.runtime.corpus.rows import Row, as_json

_TEXT, _NUMBER = pa.string(), pa.float64()
_PLACE = {"start": _NUMBER, "end": _NUMBER, "confidence": _NUMBER}
_WORDS = pa.list_(pa.struct({"word": _TEXT, **_PLACE}))
_SEGMENTS = pa.list_(pa.struct({"text": _TEXT, **_PLACE, "words": _WORDS}))
_RESULTS = {"segments": _SEGMENTS, "model": _TEXT, "options": _TEXT, "error": _TEXT, "warnings": pa.list_(_TEXT)}
_FROM_LIST = {"reference": _TEXT, "speaker": _TEXT, "fields": _TEXT}
SCHEMA = pa.schema({"key": _TEXT, "text": _TEXT, "duration": _NUMBER, **_FROM_LIST, **_RESULTS})
"""Columns of results. `options` and `fields` are JSON."""
NEMO_SCHEMA = pa.schema({"key": _TEXT, "pred_text": _TEXT, "read_duration": _NUMBER, "fields": _TEXT, **_RESULTS})
"""Columns of results for a NeMo list. `fields` contains the fields of the list as JSON."""


def to_table(rows: Iterable[Row]) -> pa.Table:
    """Return a table of rows. Either all rows or none must come from a NeMo list."""
    flat = list(rows)
    is_nemo = bool(flat) and "pred_text" in flat[0]
    schema = NEMO_SCHEMA if is_nemo else SCHEMA
    if is_nemo:
        own = set(schema.names) - {"fields"}
        flat = [{**row, "fields": {name: row[name] for name in row if name not in own}} for row in flat]
    content = [{name: _flat(name, row.get(name)) for name in schema.names} for row in flat]
    return pa.Table.from_pylist(content, schema=schema)


def _flat(name: str, value: Any) -> Any:
    if name in ("options", "fields"):
        return None if value is None else as_json(value)
    if name == "warnings" and value is not None:
        return [_valid(warning) for warning in value]
    return _valid(value) if isinstance(value, str) else value


def _valid(text: str) -> str:
    """Escape invalid UTF-8 bytes and lone surrogates, because Parquet cannot store them."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


def write(blocks: Iterable[Iterable[Row]], file: Path) -> int:
    """Write blocks of rows, all or none from a NeMo list, to a Parquet file. Return the number of rows."""
    num_rows, writer = 0, None
    for table in map(to_table, blocks):
        writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
        writer.write_table(table)
        num_rows += len(table)
    if writer is None:
        pq.write_table(to_table([]), file)
    else:
        writer.close()
    return num_rows
