"""Does a bundle give the same results on every processor? Compared on this machine and in emulators.

    python -m u2moe.benchmarks.studies.processors --bundle float32=FP32 --bundle int8=INT8 [--manifest TEST.tsv ...]
        --processor "AVX2=qemu-x86_64 -cpu Haswell python" [--output processors.json]

The first bundle is the reference, which runs only on this machine. A processor is a name and the command of an
interpreter in which `u2moe` is installed; "here" always comes first. Without lists, the demo model's clips are
recognised. Debian's qemu-user emulates processors; another architecture also needs an interpreter and wheels for it,
such as `qemu-aarch64 -L ROOT ROOT/usr/bin/python3`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import of_bundle, publish
from u2moe.benchmarks.studies.shared.script import named, report, run_script, script_parser
from u2moe.runtime import Bundle
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.recognizer import DEMO_FOLDER
from u2moe.runtime.text.word_errors import Recording, WordErrors, read_manifest

Array = npt.NDArray[Any]

HERE = "here"
OUTPUTS = Path(__file__).with_name("shared") / "outputs.py"


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The outputs of one bundle for all recordings on one processor.

    Attributes:
        process: the processor and software, see `outputs.describe_process`.
        texts: text of every recording, by context.
        log_probs: log-probabilities [time, vocab] of every recording, by context.
    """

    process: Mapping[str, Any]
    texts: Mapping[str, Sequence[str]]
    log_probs: Mapping[str, Sequence[Array]]


def outputs_of(command: Sequence[str], bundle: Path, samples: Path) -> Outputs:
    """Run `outputs` with the command of an interpreter and read its results.

    Raises:
        subprocess.CalledProcessError: it failed; its messages are on standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outputs.npz"
        arguments = [*command, *map(str, (OUTPUTS, bundle, samples, out))]
        subprocess.run(arguments, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # noqa: S603
        with np.load(out) as arrays:
            about = json.loads(bytes(arrays["about"]).decode())
            log_probs = {
                name: [arrays[f"{name}/{number}"] for number in range(len(texts))]
                for name, texts in about["texts"].items()
            }
    return Outputs(process=about["process"], texts=about["texts"], log_probs=log_probs)


def compared(found: Outputs, reference: Outputs, same: Outputs, recordings: Sequence[Recording]) -> dict[str, Any]:
    """By context: the differences of a bundle on a processor from the reference, and from the same bundle here.

    Returns:
        `reference`: differences of log-probabilities from the reference, see `differences`; `here`: those from the
        same bundle here; `num_other_texts`: recordings whose text differs from that here; `num_words` and `num_errors`.
    """
    result = {}
    for context, texts in found.texts.items():
        errors = WordErrors()
        for recording, text in zip(recordings, texts, strict=True):
            errors.add(recording.transcript, text)
        result[context] = {
            "reference": differences(reference.log_probs[context], found.log_probs[context]),
            "here": differences(same.log_probs[context], found.log_probs[context]),
            "num_other_texts": sum(map(str.__ne__, same.texts[context], texts)),
            "num_recordings": len(texts),
            "num_words": errors.num_words,
            "num_errors": errors.num_errors,
        }
    return result


def differences(expected: Sequence[Array], found: Sequence[Array]) -> dict[str, float]:
    """Differences between log-probabilities [time, vocab] of several recordings.

    Returns:
        `mean` and `largest` magnitude of the difference; `divergence`: mean Kullback-Leibler divergence per frame.
    """
    before, after = (np.concatenate(part).astype(np.float64) for part in (expected, found))
    difference = before - after
    divergence = (np.exp(before) * difference).sum(axis=1)
    return {
        "mean": round(float(np.abs(difference).mean()), 6),
        "largest": round(float(np.abs(difference).max()), 5),
        "divergence": round(float(divergence.mean()), 8),
    }


def measure(
    bundles: Mapping[str, Path],
    processors: Mapping[str, Sequence[str]],
    recordings: Sequence[Recording],
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Compare bundles on processors.

    Args:
        bundles: folders by name; the first is the reference, which runs only here.
        processors: commands of other interpreters by name.
        recordings: recordings to recognise.
        progress: called with a line for each bundle on each processor.

    Returns:
        `bundles`: the digest of each; `processors`: command and process of each; `found`: by bundle and processor, see
        `compared`.
    """
    rate = Bundle.open(next(iter(bundles.values()))).manifest.features.sample_rate
    commands = {HERE: [sys.executable], **processors}
    found: dict[str, dict[str, Any]] = {}
    described: dict[str, Any] = {}
    reference: Outputs | None = None
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.npz"
        arrays = {str(number): read_audio(item.path, rate) for number, item in enumerate(recordings)}
        np.savez(samples, **arrays)  # type: ignore[arg-type]
        for bundle, path in bundles.items():
            same: Outputs | None = None
            for name, command in commands.items() if reference else [(HERE, commands[HERE])]:
                progress(f"{bundle}, {name}")
                one = outputs_of(command, path, samples)
                same, reference = same or one, reference or one
                found.setdefault(bundle, {})[name] = compared(one, reference, same, recordings)
                described[name] = {"command": shlex.join(map(_file_name, command)), **one.process}
    digests = {name: of_bundle(path)["bundle"] for name, path in bundles.items()}
    return {"bundles": digests, "processors": described, "found": found}


def _file_name(part: str) -> str:
    """A part of a command without the folders of this machine."""
    return re.sub(r"[^:=]*/", "", part)


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each bundle, processor and context, and how many recordings and words there were.

    Of the second bundle: `least` and `most` mean difference from the reference, and `other_texts`, on any processor.
    """
    header = (
        "bundle", "processor", "context", "difference from reference", "divergence",
        "difference from here", "other texts", "errors",
    )  # fmt: skip
    rows = []
    for bundle, processor, context, item in _cells(results):
        away, here = item["reference"], item["here"]
        rows.append(
            (
                bundle, processor, context,
                f"{away['mean']:.4f} ({away['largest']:.2f})", f"{away['divergence']:.6f}",
                f"{here['mean']:.4f} ({here['largest']:.2f})", f"{item['num_other_texts']} of {item['num_recordings']}",
                item["num_errors"],
            )
        )  # fmt: skip
    *_, last = _cells(results)
    bundle = list(results["found"])[1]
    away = [item["reference"]["mean"] for name, _, _, item in _cells(results) if name == bundle]
    return {
        "table": table(header, rows, left=3),
        "reference": next(iter(results["bundles"])),
        "num_recordings": str(last[-1]["num_recordings"]),
        "num_words": str(last[-1]["num_words"]),
        "least": f"{min(away):.3f}",
        "most": f"{max(away):.3f}",
        "other_texts": str(sum(item["num_other_texts"] for name, _, _, item in _cells(results) if name == bundle)),
    }


def _cells(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    for bundle, processors in results["found"].items():
        for processor, contexts in processors.items():
            for context, item in contexts.items():
                yield bundle, processor, context, item


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = script_parser("studies.processors", __doc__)
    parser.add_argument("--bundle", type=named, action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--processor", type=named, action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--manifest", type=Path, action="append", help="list of recordings: path<TAB>transcript")
    parser.add_argument("--first", type=int, help="use only the first N recordings of each list (default: all)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    manifests = args.manifest or [DEMO_FOLDER / "clips" / "transcripts.txt"]
    recordings = [recording for manifest in manifests for recording in read_manifest(manifest)[: args.first]]
    bundles = {name: Path(folder) for name, folder in args.bundle}
    processors = {name: shlex.split(command) for name, command in args.processor}
    found = measure(bundles, processors, recordings, report)
    publish(None, {"sets": [manifest.stem for manifest in manifests], **found}, values, args.output)
    return 0


if __name__ == "__main__":
    run_script(main)
