"""Makes and reads rows of results, one for each entry. `parquet` writes them as Parquet."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from u2moe.runtime.corpus.entry import Entry
from u2moe.runtime.corpus.run_folder import RunDescription
from u2moe.runtime.language.model import LanguageModelOptions
from u2moe.runtime.options import DecodingOptions
from u2moe.runtime.result import Result, Transcript, WordResult

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowMaker:
    """Makes result rows from entries and their transcripts or errors.

    Rows for NeMo's tools contain all fields of the list. Its transcript is `text`, and the recognised text `pred_text`.
    """

    model: str  # fingerprint of the bundle
    options: Mapping[str, Any]  # decoding options that differ from the defaults, as JSON
    is_nemo: bool = False

    @classmethod
    def of_run(cls, run: RunDescription) -> Self:
        """Return the row maker of a run."""
        return cls(model=run.model, options=changed_options(run.options), is_nemo=run.list_format == "nemo")

    def of_transcript(self, entry: Entry, transcript: Transcript, warnings: Sequence[str] = ()) -> Row:
        """Return the row of a recognised entry. If the audio ends early, the row has both a text and an error."""
        text, duration = transcript.text, round(transcript.duration, 3)
        made: dict[str, Any] = {"segments": [_segment(segment) for segment in transcript.segments]}
        made |= {"model": self.model, "options": self.options, "error": transcript.error}
        made |= {"warnings": list(warnings)} if warnings else {}
        if self.is_nemo:
            return {**entry.fields, "key": entry.key, "pred_text": text, "read_duration": duration, **made}
        said = {"reference": entry.text, "speaker": entry.speaker, "fields": dict(entry.fields) or None}
        known = {name: value for name, value in said.items() if value is not None}
        return {"key": entry.key, "text": text, "duration": duration, **known, **made}


def options_as_json(options: DecodingOptions) -> dict[str, Any]:
    """Return decoding options as JSON, for the description of a run. null means the bundle's default."""
    model = options.language_model
    content = dataclasses.asdict(dataclasses.replace(options, language_model=None, grammar=None))
    content["grammar"] = options.grammar and options.grammar.lines
    content["language_model"] = model.digest if isinstance(model, LanguageModelOptions) else model
    as_json: dict[str, Any] = json.loads(json.dumps(content))
    return as_json


def changed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that differ from the defaults. Only these are stored in rows."""
    defaults = options_as_json(DecodingOptions())
    return {name: value for name, value in options.items() if value != defaults.get(name)}


def _rounded(item: Result | WordResult, *names: str) -> dict[str, Any]:
    """Return the fields `names` of a segment or word, and its confidence."""
    confidence = None if item.confidence is None else round(item.confidence, 4)  # further decimals are noise
    return {**{name: getattr(item, name) for name in names}, "confidence": confidence}


def _segment(segment: Result) -> dict[str, Any]:
    words = [_rounded(word, "word", "start", "end") for word in segment.words]
    return {**_rounded(segment, "text", "start", "end"), "words": words}


def as_line(row: Row) -> bytes:
    """Return a row as a line of JSON in UTF-8. If it contains invalid Unicode, all non-ASCII characters are escaped."""
    try:
        return as_json(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return as_json(row).encode() + b"\n"


def as_json(value: Any, *, ensure_ascii: bool = True) -> str:
    """Return a value as JSON. NaN and infinity do not exist in JSON and become null."""
    options: dict[str, Any] = {"ensure_ascii": ensure_ascii, "separators": (",", ":"), "allow_nan": False}
    try:
        return json.dumps(value, **options)
    except ValueError:
        return json.dumps(_without_nan(value), **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The content of a row, in the same form for all lists.

    Attributes:
        key: key of the entry.
        text: recognised text.
        duration: seconds of audio that were read.
        reference: transcript in the list; None if missing.
        speaker: speaker in the list; None if missing.
        fields: other fields of the entry. For a NeMo list, the whole row.
        error: why recognition failed or ended early; None without an error.
        warnings: warnings about the audio.
    """

    key: str
    text: str
    duration: float
    reference: str | None
    speaker: str | None
    fields: Mapping[str, Any]
    error: str | None
    warnings: Sequence[str] = ()


def duration_of(row: Row) -> float:
    """Return the seconds of audio that were read, as stated in a row."""
    duration: float = row["read_duration" if "pred_text" in row else "duration"]
    return duration


def outcome_of(row: Row) -> Outcome:
    """Return the content of a row. Raise KeyError or TypeError if the row is malformed."""
    key, is_nemo = row["key"], "pred_text" in row
    reference, speaker = row.get("text" if is_nemo else "reference"), row.get("speaker")
    return Outcome(
        key=key,
        text=row["pred_text" if is_nemo else "text"],
        duration=duration_of(row),
        reference=None if reference is None else str(reference),
        speaker=None if speaker is None else str(speaker),
        fields=row if is_nemo else row.get("fields") or {},
        error=row["error"],
        warnings=row.get("warnings", ()),
    )
