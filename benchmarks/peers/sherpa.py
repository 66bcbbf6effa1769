"""sherpa-onnx's C++ runtime compared with our Python one: the same weights and audio, in turn, in separate processes.

    python -m u2moe.benchmarks.peers.sherpa FOLDER [--make] [--only demo/]

Both use int8. FOLDER holds the bundles of random weights (`full_size.models`); missing ones, and graphs for
sherpa-onnx, are created. Results are written cell by cell and replace earlier ones. The table is made only from the
results (`results.pages`). tests/test_sherpa.py checks that both find the same tokens for the same features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.full_size.models import make_artefact
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, ratios
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS, UTTERANCE_S, speech
from u2moe.benchmarks.peers.process import PeerProcess, write_wav
from u2moe.benchmarks.results.files import results_file, write_json
from u2moe.benchmarks.results.markdown import quartiles, table
from u2moe.benchmarks.results.provenance import recorded, resumed
from u2moe.benchmarks.results.targets import Target
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.export.random_checkpoint import PRESETS
from u2moe.export.sherpa import export_sherpa
from u2moe.export.sherpa_graphs import OFFLINE, ONLINE, SherpaOptions
from u2moe.runtime.bundle.bundle import Bundle
from u2moe.runtime.bundle.manifest import MANIFEST_FILE, TOKENS_FILE, Manifest
from u2moe.runtime.recognizer import DEMO_FOLDER
from u2moe.runtime.text.word_errors import edit_distance

DEMO = "demo"
OURS, THEIRS = "u2moe", "sherpa-onnx"
MODES = {"streaming": "sherpa-online", "full": "sherpa-offline"}
"""Engine of sherpa-onnx for each mode."""
REPETITIONS = 7
LIMIT = 1.05
"""Target for the ratio of our time to theirs, at full size."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting, measured with both runtimes in turn, in int8.

    Attributes:
        model: preset of `random_checkpoint`, or `DEMO`.
        mode: one of `MODES`.
    """

    model: str
    mode: str

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.model}/{self.mode}"


def all_cells(model: str = "dense-225m") -> list[Cell]:
    """All settings of a model of random weights and of the demo model."""
    return [Cell(model=name, mode=mode) for name in (model, DEMO) for mode in MODES]


def bundle_of(cell: Cell, root: Path, progress: Callable[[str], None] = lambda _: None) -> Bundle:
    """The bundle of a cell, created if missing."""
    if cell.model == DEMO:
        return Bundle.open(DEMO_FOLDER)
    return Bundle.open(make_artefact(cell.model, root, progress=progress).bundle("int8"), verify=False)


def graphs_of(cell: Cell, bundle: Bundle, root: Path, progress: Callable[[str], None] = lambda _: None) -> Path:
    """Folder of the bundle's graphs for sherpa-onnx, created if missing or older than the bundle."""
    folder = root / cell.model / "sherpa"
    made_of = bundle.path / MANIFEST_FILE
    if not folder.is_dir() or folder.stat().st_mtime < made_of.stat().st_mtime:
        progress(f"{cell.model}: graphs for sherpa-onnx")
        folder.parent.mkdir(parents=True, exist_ok=True)
        options = SherpaOptions(chunk_size=CHUNK_SIZE, num_left_chunks=NUM_LEFT_CHUNKS)
        export_sherpa(bundle.path, folder, options, overwrite=True, progress=progress)
    return folder


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


def engines(cell: Cell, bundle: Bundle, graphs: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name and options of both engines: greedy search, one thread, no endpoints."""
    streaming = cell.mode == "streaming"
    chunks = {"chunk_size": CHUNK_SIZE, "num_left_chunks": NUM_LEFT_CHUNKS} if streaming else {}
    ours = {"model": str(bundle.path), "search": "ctc_greedy", "endpoint": False, "num_threads": 1}
    theirs = {
        "model": str(graphs / (ONLINE if streaming else OFFLINE).file),
        "tokens": str(graphs / TOKENS_FILE),
        "sample_rate": bundle.manifest.features.sample_rate,
        "feature_dim": bundle.manifest.features.num_mel_bins,
        "num_threads": 1,
    }
    return {OURS: ("u2moe", ours | chunks), THEIRS: (MODES[cell.mode], theirs | chunks)}


def measure(cell: Cell, bundle: Bundle, graphs: Path, repetitions: int = REPETITIONS) -> dict[str, Any]:
    """The content of a cell: seconds of audio; for each runtime the seconds of every round, memory and loading time.

    Args:
        cell: the setting.
        bundle: bundle of the cell.
        graphs: its graphs for sherpa-onnx.
        repetitions: rounds after a warm-up.

    Raises:
        PeerError: a runtime failed.
    """
    samples, rate = recording(bundle.manifest), bundle.manifest.features.sample_rate
    found: dict[str, Any] = {"audio_s": len(samples) / rate}
    with TemporaryDirectory() as folder:
        wav = write_wav(Path(folder) / "speech.wav", samples, rate)
        started = {name: PeerProcess.timed(*engine) for name, engine in engines(cell, bundle, graphs).items()}
        try:
            cases = {name: partial(peer.recognise, wav) for name, peer in started.items()}
            replies = interleaved(cases, repetitions)
        finally:
            for peer in started.values():
                peer.close()
    for name, rounds in replies.items():
        found[name] = {
            "seconds": [item["compute_s"] for item in rounds],
            "cpu_s": [item["cpu_s"] for item in rounds],
            "peak_mb": rounds[-1]["peak_mb"],
            "load_s": started[name].load_s,
        }
    texts = [letters(rounds[-1]["text"]) for rounds in replies.values()]
    found["letters"], found["different_letters"] = len(texts[0]), edit_distance(*texts)
    return found


def letters(text: str) -> str:
    """The text without spaces: the runtimes mark word boundaries differently."""
    return "".join(text.split())


def run(
    root: Path,
    results: Path,
    *,
    cells: Sequence[Cell],
    repetitions: int = REPETITIONS,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure cells again, and write the results after each.

    Args:
        root: folder of the bundles; missing ones are created.
        results: JSON file, which may already hold other cells.
        cells: settings.
        repetitions: rounds per cell.
        progress: called with a line for each step.
    """
    content = resumed(results, {"cells": {}})
    for cell in cells:
        bundle = bundle_of(cell, root, progress)
        graphs = graphs_of(cell, bundle, root, progress)
        progress(cell.key)
        content["cells"][cell.key] = measure(cell, bundle, graphs, repetitions)
        content["sherpa_onnx"] = sherpa_versions()
        write_json(results, recorded(content))
    return content


def sherpa_versions() -> dict[str, str]:
    """Version of onnxruntime inside the sherpa-onnx wheel, which is not ours; empty if it cannot be found."""
    spec = find_spec("sherpa_onnx")
    library = Path(spec.origin).parent / "lib" / "libonnxruntime.so" if spec and spec.origin else None
    if library is None or not library.exists():
        return {}
    found = re.search(rb"VERS_(\d+\.\d+\.\d+)\0", library.read_bytes())
    return {"onnxruntime": found[1].decode()} if found else {}


def ratio(cell: Mapping[str, Any]) -> Spread:
    """Ratio of our time to theirs."""
    return ratios(cell[OURS]["seconds"], cell[THEIRS]["seconds"])


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Values for pages: a row and the ratio of each cell, and the version of onnxruntime in sherpa-onnx."""
    header = ("", "u2moe", "sherpa-onnx", "ours / theirs", "memory, MB", "load, s", "letters")
    cells = results["cells"]
    return {
        "table": table(header, (_row(key.replace("/", ", "), cell) for key, cell in cells.items())),
        "onnxruntime": results["sherpa_onnx"].get("onnxruntime", "(unknown)"),
        **{key.replace("/", "."): f"{ratio(cell).median:.2f}" for key, cell in cells.items()},
    }


def targets(results: Mapping[str, Any]) -> list[Target]:
    """Targets for the cells at full size."""
    return [
        Target(name=f"u2moe / sherpa-onnx, {key.replace('/', ', ')}", found=ratio(cell), limit=LIMIT, at_most=True)
        for key, cell in results["cells"].items()
        if not key.startswith(DEMO)
    ]


def _row(title: str, cell: Mapping[str, Any]) -> tuple[str, ...]:
    both = (cell[OURS], cell[THEIRS])
    factors = (Spread.of([seconds / cell["audio_s"] for seconds in item["seconds"]]) for item in both)
    return (
        title,
        *(quartiles(factor, 4) for factor in factors),
        quartiles(ratio(cell), 3),
        " / ".join(f"{item['peak_mb']:.0f}" for item in both),
        " / ".join(quartiles(Spread.of(item["load_s"])) for item in both),
        f"{cell['different_letters']} of {cell['letters']}",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("peers.sherpa", __doc__)
    parser.add_argument("folder", type=Path, help="folder of the bundles, created if missing")
    parser.add_argument("--results", type=Path, help="JSON file; cells are measured again")
    parser.add_argument("--model", default="dense-225m", choices=sorted(PRESETS), help="preset of random weights")
    parser.add_argument("--only", metavar="TEXT", default="", help="only cells whose name contains it, such as demo/")
    parser.add_argument("--make", action="store_true", help="create bundles and graphs, and measure nothing")
    args = parser.parse_args(arguments)
    cells = [cell for cell in all_cells(args.model) if args.only in cell.key]
    if args.make:
        for cell in cells:
            graphs_of(cell, bundle_of(cell, args.folder, report), args.folder, report)
        return
    results = args.results or results_file("sherpa")
    print(values(run(args.folder, results, cells=cells, progress=report))["table"])


if __name__ == "__main__":
    run_script(main)
