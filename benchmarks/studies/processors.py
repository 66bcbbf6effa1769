"""Does a bundle give the same texts on every processor? Compared on this machine and in emulators.

    python -m u2moe.benchmarks.studies.processors --bundle float32=FP32 --bundle int8=INT8 [--list TEST.tsv ...]
        --processor "AVX2=qemu-x86_64 -cpu Haswell python" [--output FILE]

A processor is a name and the command of an interpreter in which `u2moe` is installed; "here" always comes first.
Without lists, the demo model's clips are recognised. Debian's qemu-user emulates processors; another architecture also
needs an interpreter and wheels for it, such as `qemu-aarch64 -L ROOT ROOT/usr/bin/python3`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import of_bundle, publish
from u2moe.benchmarks.studies.shared.script import named, report, run_script, script_parser
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.places import DEMO_FOLDER
from u2moe.runtime.text.word_errors import WordErrors

HERE = "here"
CONTEXTS = {"full context": [], "chunk 16": ["--stream", "--chunk-size", "16"]}
"""Options of `u2moe transcribe`."""


def texts_of(command: Sequence[str], bundle: Path, options: Sequence[str], files: Sequence[Path]) -> list[str]:
    """The texts of recordings by `u2moe transcribe` of another interpreter, on onnxruntime alone.

    Raises:
        subprocess.CalledProcessError: it failed; its messages are on standard error.
    """
    own = ["-m", "u2moe", "transcribe", "--model", str(bundle), "-f", "json", *options, *map(str, files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "U2MOE_KERNELS": "onnxruntime"}
    done = subprocess.run([*command, *own], env=environment, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    return [json.loads(line)["text"] for line in done.stdout.splitlines()]


def measure(
    bundles: Mapping[str, Path], processors: Mapping[str, Sequence[str]], recordings: Sequence[Recording]
) -> dict[str, Any]:
    """Recordings whose text is not that of the same bundle here, and word errors, by bundle, processor and context."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    files = [recording.path for recording in recordings]
    for bundle, path in bundles.items():
        here: dict[str, list[str]] = {}
        for name, command in {HERE: [sys.executable], **processors}.items():
            for context, options in CONTEXTS.items():
                report(f"{bundle}, {name}, {context}")
                texts = texts_of(command, path, options, files)
                errors = WordErrors()
                for recording, text in zip(recordings, texts, strict=True):
                    errors.add(recording.transcript, text)
                others = sum(map(str.__ne__, here.setdefault(context, texts), texts))
                cell = {"num_other_texts": others, "num_recordings": len(texts), "num_errors": errors.num_errors}
                found.setdefault(bundle, {}).setdefault(name, {})[context] = {**cell, "num_words": errors.num_words}
    return {"bundles": {name: of_bundle(path)["bundle"] for name, path in bundles.items()}, "found": found}


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each bundle, processor and context."""
    rows = [
        (bundle, processor, context, f"{item['num_other_texts']} of {item['num_recordings']}",
         f"{item['num_errors']} of {item['num_words']} words")
        for bundle, processors in results["found"].items()
        for processor, contexts in processors.items()
        for context, item in contexts.items()
    ]  # fmt: skip
    return {"table": table(("bundle", "processor", "context", "other texts", "errors"), rows, left=3)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = script_parser("studies.processors", __doc__)
    parser.add_argument("--bundle", type=named, action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--processor", type=named, action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--list", type=Path, action="append", help="list of recordings: path<TAB>transcript")
    parser.add_argument("--first", type=int, help="use only the first N recordings of each list (default: all)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    manifests = args.list or [DEMO_FOLDER / "clips" / "transcripts.txt"]
    recordings = [recording for manifest in manifests for recording in read_recordings(manifest)[: args.first]]
    bundles = {name: Path(folder) for name, folder in args.bundle}
    processors = {name: shlex.split(command) for name, command in args.processor}
    publish(None, measure(bundles, processors, recordings), values, args.output)
    return 0


if __name__ == "__main__":
    run_script(main)
