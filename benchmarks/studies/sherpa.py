"""How fast is sherpa-onnx's C++ runtime on the same weights and audio, in int8, beside our Python one?

    python -m u2moe.benchmarks.studies.sherpa FOLDER [--prepare] [--only demo/]

FOLDER holds the bundles of random weights (`random_models`); missing ones, and graphs for sherpa-onnx, are created. The
runtimes are processes of their own, and take turns. Results are written cell by cell and replace earlier ones.
tests/test_sherpa.py checks that both find the same tokens for the same features.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.instruments.statistics import Spread, interleaved, ratios
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS, UTTERANCE_S, speech
from u2moe.benchmarks.results.files import results_file, write_json
from u2moe.benchmarks.results.markdown import quartiles, table
from u2moe.benchmarks.results.provenance import recorded, resumed
from u2moe.benchmarks.results.targets import Target
from u2moe.benchmarks.studies.shared.process import PeerProcess, write_wav
from u2moe.benchmarks.studies.shared.random_models import SMALL, make_bundle
from u2moe.benchmarks.studies.shared.script import report, run_script, script_parser
from u2moe.export.sherpa import export_sherpa
from u2moe.export.sherpa_graphs import OFFLINE, ONLINE, SherpaOptions
from u2moe.runtime.bundle.bundle import Bundle
from u2moe.runtime.bundle.manifest import TOKENS_FILE, Manifest
from u2moe.runtime.places import DEMO_FOLDER

DEMO = "demo"
OURS, THEIRS = "u2moe", "sherpa-onnx"
MODES = {"streaming": "sherpa-online", "full": "sherpa-offline"}
"""Engine of sherpa-onnx for each mode."""
CELLS = [f"{model}/{mode}" for model in (SMALL, DEMO) for mode in MODES]
REPETITIONS = 7
LIMIT = 1.05
"""Target for the ratio of our time to theirs, at full size."""


def prepare(model: str, root: Path) -> tuple[Bundle, Path]:
    """The bundle of a model in int8, and the folder of its graphs for sherpa-onnx; created if missing."""
    bundle = Bundle.open(DEMO_FOLDER) if model == DEMO else make_bundle(model, "int8", root, report)
    folder = root / model / "sherpa"
    if not folder.is_dir():
        report(f"{model}: graphs for sherpa-onnx")
        folder.parent.mkdir(parents=True, exist_ok=True)
        options = SherpaOptions(chunk_size=CHUNK_SIZE, num_left_chunks=NUM_LEFT_CHUNKS)
        export_sherpa(bundle.path, folder, options, progress=report)
    return bundle, folder


def recording(manifest: Manifest, seconds: float = UTTERANCE_S) -> npt.NDArray[np.float32]:
    """At most `seconds` of real speech, in complete chunks: sherpa-onnx drops the rest."""
    features, config = manifest.features, manifest.model
    samples = speech(seconds, features.sample_rate)
    shift, length = (
        round(value * features.sample_rate / 1000) for value in (features.frame_shift_ms, features.frame_length_ms)
    )
    stride = CHUNK_SIZE * config.subsampling_rate
    window = stride - config.subsampling_rate + config.window
    num_frames = (len(samples) - length) // shift + 1
    num_frames = (num_frames - window) // stride * stride + window
    return samples[: (num_frames - 1) * shift + length]


def measure(cell: str, bundle: Bundle, graphs: Path, repetitions: int = REPETITIONS) -> dict[str, Any]:
    """The content of a cell: `audio_s`; for each runtime the seconds of every round, memory, loading times and text.

    Greedy search, one thread, no endpoints.

    Raises:
        PeerError: a runtime failed.
    """
    mode, features = cell.split("/")[1], bundle.manifest.features
    streaming = mode == "streaming"
    chunks = {"chunk_size": CHUNK_SIZE, "num_left_chunks": NUM_LEFT_CHUNKS} if streaming else {}
    ours = {"model": str(bundle.path), "search": "ctc_greedy", "endpoint": False, **chunks}
    graph = graphs / (ONLINE if streaming else OFFLINE).file
    theirs = {
        "model": str(graph), "tokens": str(graphs / TOKENS_FILE), "sample_rate": features.sample_rate,
        "feature_dim": features.num_mel_bins, "num_threads": 1, **chunks,
    }  # fmt: skip
    samples = recording(bundle.manifest)
    with TemporaryDirectory() as folder:
        wav = write_wav(Path(folder) / "speech.wav", samples, features.sample_rate)
        with PeerProcess.timed("u2moe", ours) as one, PeerProcess.timed(MODES[mode], theirs) as other:
            both = {OURS: one, THEIRS: other}
            cases = {name: partial(process.recognise, wav) for name, process in both.items()}
            replies = interleaved(cases, repetitions)
    found: dict[str, Any] = {"audio_s": len(samples) / features.sample_rate}
    for name, rounds in replies.items():
        found[name] = {
            "seconds": [item["compute_s"] for item in rounds], "peak_mb": rounds[-1]["peak_mb"],
            "load_s": both[name].load_s, "text": rounds[-1]["text"],
        }  # fmt: skip
    return found


def sherpa_versions() -> dict[str, str]:
    """Version of onnxruntime inside the sherpa-onnx wheel, which is not ours; empty if it cannot be found."""
    spec = find_spec("sherpa_onnx")
    library = Path(spec.origin).parent / "lib" / "libonnxruntime.so" if spec and spec.origin else None
    if library is None or not library.exists():
        return {}
    found = re.search(rb"VERS_(\d+\.\d+\.\d+)\0", library.read_bytes())
    return {"onnxruntime": found[1].decode()} if found else {}


def ratio(cell: Mapping[str, Any]) -> Spread:
    """Ratio of our time to theirs, of rounds."""
    return ratios(cell[OURS]["seconds"], cell[THEIRS]["seconds"])


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Values for pages: a row and the ratio of each cell, and the version of onnxruntime in sherpa-onnx."""
    rows = []
    for key, cell in results["cells"].items():
        both = (cell[OURS], cell[THEIRS])
        factors = (Spread.of([seconds / cell["audio_s"] for seconds in item["seconds"]]) for item in both)
        memory = " / ".join(f"{item['peak_mb']:.0f}" for item in both)
        load = " / ".join(quartiles(Spread.of(item["load_s"])) for item in both)
        title = key.replace("/", ", ")
        rows.append([title, *(quartiles(factor, 4) for factor in factors), quartiles(ratio(cell), 3), memory, load])
    return {
        "table": table(("", "u2moe", "sherpa-onnx", "ours / theirs", "memory, MB", "load, s"), rows),
        "onnxruntime": results["sherpa_onnx"].get("onnxruntime", "(unknown)"),
        **{key.replace("/", "."): f"{ratio(cell).median:.2f}" for key, cell in results["cells"].items()},
    }


def targets(results: Mapping[str, Any]) -> Iterator[Target]:
    """Targets for the cells at full size."""
    for key, cell in results["cells"].items():
        if not key.startswith(DEMO):
            name = f"u2moe / sherpa-onnx, {key.replace('/', ', ')}"
            yield Target(name=name, found=ratio(cell), limit=LIMIT, at_most=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("studies.sherpa", __doc__)
    parser.add_argument("folder", type=Path, help="folder of the bundles, created if missing")
    parser.add_argument("--results", type=Path, help="JSON file; cells are measured again")
    parser.add_argument("--only", metavar="TEXT", default="", help="only cells whose name contains it, such as demo/")
    parser.add_argument("--prepare", action="store_true", help="create bundles and graphs, and measure nothing")
    args = parser.parse_args(arguments)
    results = args.results or results_file("sherpa")
    content = resumed(results, {"cells": {}})
    for cell in (cell for cell in CELLS if args.only in cell):
        bundle, graphs = prepare(cell.split("/")[0], args.folder)
        if not args.prepare:
            report(cell)
            content["cells"][cell] = measure(cell, bundle, graphs)
            content["sherpa_onnx"] = sherpa_versions()
            write_json(results, recorded(content))
    if content["cells"]:
        print(values(content)["table"])


if __name__ == "__main__":
    run_script(main)
