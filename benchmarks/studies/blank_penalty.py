"""What does a blank penalty change? Word errors and deletions by penalty, for one model in several formats.

    python -m u2moe.benchmarks.studies.blank_penalty float32=FOLDER int8=FOLDER --list TEST.tsv ...

Recordings are recognised in chunks of 16 encoder frames with the bundle's search.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from u2moe.benchmarks.instruments.statistics import show_progress
from u2moe.benchmarks.results.files import of_bundle, publish
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.studies.shared.script import named, script, study_parser
from u2moe.runtime import DecodingOptions, Recognizer
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.text.word_errors import WordErrors

PENALTIES = (0.0, 0.5, 1.0, 2.0, 4.0)


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for pages: a table by bundle and penalty, and the numbers of words and recordings."""
    rows = [
        (name, penalty, f"{item['errors'] / item['words']:.1%}", item["errors"], item["deletions"], item["insertions"])
        for name, own in results["bundles"].items()
        for penalty, item in own["penalties"].items()
    ]
    words = {str(item["words"]) for own in results["bundles"].values() for item in own["penalties"].values()}
    header = ("format", "penalty", "word errors", "errors", "deletions", "insertions")
    return {"table": table(header, rows), "words": words.pop(), "recordings": str(results["num_recordings"])}


@script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("blank_penalty", __doc__)
    parser.add_argument("bundles", nargs="+", type=named, metavar="NAME=FOLDER")
    parser.add_argument("--list", nargs="+", type=Path, required=True, help="lists of recordings: path<TAB>transcript")
    args = parser.parse_args(arguments)
    recordings = [recording for path in args.list for recording in read_recordings(path)]
    found: dict[str, Any] = {}
    for name, folder in args.bundles:
        recognizer, counts = Recognizer.from_pretrained(folder), {}
        for penalty in PENALTIES:
            show_progress(f"{name}, {penalty:g}")
            options = DecodingOptions(chunk_size=16, num_left_chunks=4, blank_penalty=penalty)
            errors = WordErrors()
            for recording in recordings:
                errors.add(recording.transcript, recognizer.transcribe(recording.path, options=options).text)
            counts[f"{penalty:g}"] = errors.data(0)
        found[name] = {**of_bundle(Path(folder)), "penalties": counts}
    publish(args.results, {"num_recordings": len(recordings), "bundles": found}, values)
