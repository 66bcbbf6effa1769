"""Reads a manifest of ten million lines as a run does, and looks at the memory.

python -m u2moe.benchmarks.endurance.long_manifest WORK [--lines 10000000]
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from u2moe.benchmarks.endurance.memory import Memory, resident_mb
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import publish
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.runtime.corpus.blocks import cut_into_blocks
from u2moe.runtime.corpus.manifests import ManifestOptions, count_lines, digest, read_utterances
from u2moe.runtime.recognizer import DEMO_FOLDER

_BLOCK_SIZE = 256


def write_manifest(file: Path, num_lines: int) -> Path:
    """A data.list whose recordings need not exist."""
    with file.open("w", encoding="utf-8") as lines:
        for number in range(num_lines):
            record = {"key": f"s{number % 999}-{number:012}", "wav": f"/corpora/{number:012}.wav", "txt": "A B C"}
            lines.write(json.dumps(record) + "\n")
    return file


def read_manifest(file: Path, num_lines: int) -> dict[str, Any]:
    """Hash, count and read a manifest: processor seconds, and memory after a tenth of reading and at the end."""
    begin = time.process_time()
    digest(str(file), "wenet", ManifestOptions())
    counted_lines = count_lines(str(file), "wenet")
    middle, start_mb, num_read = time.process_time(), 0.0, 0
    for block in cut_into_blocks(read_utterances(file), _BLOCK_SIZE):
        num_read = block.stop
        if not start_mb and num_read * 10 >= num_lines:
            start_mb = resident_mb()
    return {
        "num_lines": num_read,
        "is_whole": counted_lines == num_read == num_lines,
        "file_mb": file.stat().st_size / 1e6,
        "hash_and_count_s": middle - begin,
        "read_s": time.process_time() - middle,
        "memory": asdict(Memory(start_mb=start_mb, end_mb=resident_mb())),
    }


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show."""
    memory = Memory(**results["memory"])
    rows = [
        ("lines", f"{results['num_lines']:,}, {results['file_mb']:.0f} MB"),
        ("hashed and counted, before the first block", f"{results['hash_and_count_s']:.0f} s of a core"),
        ("read and cut into blocks", f"{results['read_s']:.0f} s of a core"),
        ("memory after a tenth, and at the end", f"{memory.start_mb:.0f}, {memory.end_mb:.0f} MB"),
    ]
    return {
        "table": table(("", "found"), rows),
        "lines": f"{results['num_lines'] / 1e6:.0f} million",
        "minutes": f"{(results['hash_and_count_s'] + results['read_s']) / 60:.1f}",
        "mb": f"{memory.end_mb:.0f}",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = script_parser("endurance.long_manifest", __doc__)
    parser.add_argument("work", type=Path, help="folder for the manifest, which is removed")
    parser.add_argument("--lines", type=int, default=10_000_000, metavar="N", help="default: 10000000")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    file = write_manifest(args.work / "long.list", args.lines)
    report("written")
    found = read_manifest(file, args.lines)
    file.unlink()
    publish(DEMO_FOLDER, found, values, args.output)
    return int(not found["is_whole"] or Memory(**found["memory"]).grew)


if __name__ == "__main__":
    run_script(main)
