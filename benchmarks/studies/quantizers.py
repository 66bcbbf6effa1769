"""What do other quantizers make of the same network, and of those that are hard to quantize?

    U2MOE_KERNELS=onnxruntime python -m u2moe.benchmarks.studies.quantizers BUNDLE SPEECH.tsv DEV.tsv [NAME=BUNDLE ...]

Bundles are in float32. Quantizers get encoder and CTC head, those of others as plain operators, and to calibrate the
recordings of SPEECH.tsv; damage is measured on those of DEV.tsv, full context, onnxruntime alone. The hard network
computes the same in float32, to the bit: one of a hundred channels is 32 to 256 times as large as before. Our recipes
also get other bundles, hard in this way, and the first one with routers that hardly tell experts apart.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import publish
from u2moe.benchmarks.studies.shared.script import named, report, run_script, script_parser
from u2moe.quantize import quantize_bundle, recipe
from u2moe.quantize.experts.layer import expert_layers
from u2moe.quantize.report import features_of, output_errors
from u2moe.quantize.smoothing import rewritten_bundle, scale, sites_of
from u2moe.runtime import Bundle, ctc_greedy_search
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.graph.file import array_of
from u2moe.runtime.model.model import Model
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import DEFAULT_PROVIDER, SessionSettings
from u2moe.runtime.text.word_errors import edit_distance

SETTINGS = SessionSettings(num_threads=1, kernels="onnxruntime")
GRAPHS = ("encoder", "ctc")
NUM_TIMINGS, STATIC_FRAMES, NUM_FRAMES = 3, 3000, 6000
"""Timings of the longest recording; frames for static calibration, and judged ones.

Static calibration gets them as one recording: onnxruntime's histograms fail on activations of several lengths.
"""
LEAST, MOST = 5, 8
"""Exponents of the outliers: 32 to 256."""
NEAR = 1 / 64
"""What is left of the differences between the four experts of a group, for near ties."""
PLAIN, HARD = "plain", "hard"
OURS = {"u2moe int8": False, "u2moe int8, calibrated": True}
"""By name, whether the recipe int8 is calibrated."""
Frames = np.ndarray[Any, np.dtype[np.float32]]


class _Feeds(quantization.CalibrationDataReader):  # type: ignore[misc]
    """What a graph is fed in recordings, one after the other."""

    def __init__(self, feeds: Sequence[Mapping[str, Any]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Mapping[str, Any] | None:
        """The next, or None."""
        return next(self._feeds, None)


Make = Callable[[Path, Path, _Feeds], None]
"""Reads a plain graph, and writes a quantized one; with what the graph is fed in recordings."""


def _static(method: quantization.CalibrationMethod) -> Make:
    def make(source: Path, target: Path, reader: _Feeds) -> None:
        quantization.quantize_static(
            source, target, reader, op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            per_channel=True, weight_type=quantization.QuantType.QInt8, calibrate_method=method,
        )  # fmt: skip

    return make


def _blocks(bits: int) -> Make:
    def make(source: Path, target: Path, _: _Feeds) -> None:
        tool = MatMulNBitsQuantizer(onnx.load(source), bits=bits, block_size=32, is_symmetric=True, accuracy_level=4)
        tool.process()
        tool.model.save_model_to_file(str(target), use_external_data_format=False)

    return make


PEERS: Mapping[str, Make] = {
    "quantize_dynamic": lambda source, target, _: quantization.quantize_dynamic(source, target, per_channel=True),
    "quantize_static, MinMax": _static(quantization.CalibrationMethod.MinMax),
    "quantize_static, Percentile": _static(quantization.CalibrationMethod.Percentile),
    "quantize_static, Entropy": _static(quantization.CalibrationMethod.Entropy),
    "MatMulNBits, 8 bits": _blocks(8),
    "MatMulNBits, 4 bits": _blocks(4),
}
"""Quantizers of onnxruntime."""


def with_outliers(bundle: Bundle, folder: Path) -> Bundle:
    """The same network with large channels at every site that can be scaled."""
    random = np.random.default_rng(0)

    def add(model: ir.Model) -> None:
        for site in sites_of(model):
            exponents = np.zeros(len(site.columns), np.int64)
            number = max(1, len(exponents) // 100)
            chosen = random.choice(len(exponents), number, replace=False)
            exponents[chosen] = -random.integers(LEAST, MOST + 1, number)
            scale(site, exponents)

    return rewritten_bundle(bundle, folder, add)


def with_near_ties(bundle: Bundle, folder: Path) -> Bundle:
    """Another network, whose routers hardly tell experts 0 to 3 apart, nor 4 to 7, and so on."""

    def tie(model: ir.Model) -> None:
        for layer in expert_layers(model):
            gate = array_of(layer.gate)
            first = gate[:, np.arange(gate.shape[1]) // 4 * 4]
            layer.gate.const_value = ir.tensor(first + (gate - first) * np.float32(NEAR), name=layer.gate.name)

    return rewritten_bundle(bundle, folder, tie)


class _Plain:
    """A graph of plain operators as a session, which keeps what it is fed."""

    def __init__(self, file: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self._session = onnxruntime.InferenceSession(file, options, providers=[DEFAULT_PROVIDER])
        self._names = [output.name for output in self._session.get_outputs()]
        self.feeds: list[Mapping[str, Any]] = []

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.feeds.append(dict(feeds))
        return dict(zip(self._names, self._session.run(self._names, dict(feeds)), strict=True))


def _plain_model(bundle: Bundle, files: Sequence[Path]) -> tuple[Model, list[_Plain]]:
    sessions = [_Plain(file) for file in files]
    encoder, ctc = (cast("Session", session) for session in sessions)
    return Model(bundle.manifest, encoder, ctc, None), sessions


Made = tuple[str, Callable[[], Model], float, int]
"""Of a quantizer: its name, what loads the model, seconds that it took to make, and bytes."""


def peers(bundle: Bundle, heard: Sequence[Frames], folder: Path) -> Iterator[Made]:
    """What onnxruntime's quantizers make of a bundle; one that fails is reported, and left out."""
    plain = [folder / f"{name}.onnx" for name in GRAPHS]
    for file in plain:
        onnx.save(onnx.inliner.inline_local_functions(onnx.load(bundle.path / file.name)), file)
    model, sessions = _plain_model(bundle, plain)
    model.ctc(model.encode(np.concatenate(heard)[:STATIC_FRAMES]))
    for title, make in PEERS.items():
        report(title)
        files, start = [folder / f"{title}-{file.name}" for file in plain], time.process_time()
        try:
            for source, target, session in zip(plain, files, sessions, strict=True):
                make(source, target, _Feeds(session.feeds))
        except Exception as error:  # noqa: BLE001 - of any kind
            report(f"{title} fails: {' '.join(str(error).split())[:200]}")
            continue
        yield title, lambda files=files: _plain_model(bundle, files)[0], time.process_time() - start, _size(files)  # type: ignore[misc]


def ours(bundle: Bundle, speech: Sequence[Path], folder: Path) -> Iterator[Made]:
    """What our recipes make of it."""
    for title, calibrated in OURS.items():
        report(title)
        start, chosen = time.process_time(), recipe("int8", calibration=speech if calibrated else ())
        made, _ = quantize_bundle(bundle.path, folder / title, chosen)
        yield title, lambda made=made: made.load(SETTINGS), time.process_time() - start, _size(_files(made))  # type: ignore[misc]


def _files(bundle: Bundle) -> list[Path]:
    return [file for graph in GRAPHS for file in bundle.path.glob(f"{graph}.onnx*")]


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def judged(reference: Model, model: Model, features: Sequence[Frames]) -> dict[str, float]:
    """Errors of log-probabilities, tokens of greedy search that change, and milliseconds of the longest recording."""
    texts = [
        [ctc_greedy_search(each.ctc(each.encode(frames))).tokens for frames in features] for each in (reference, model)
    ]
    longest, seconds = max(features, key=len), []
    for _ in range(NUM_TIMINGS + 1):
        start = time.process_time()
        model.encode(longest)
        seconds.append(time.process_time() - start)
    return {
        "log_probs_mean": output_errors(reference, model, features)["log_probs_mean"],
        "changed_tokens": sum(map(edit_distance, *texts)) / sum(map(len, texts[0])),
        "ms": 1000 * statistics.median(seconds[1:]),
    }


def measure(
    network: Bundle, speech: Sequence[Path], dev: Sequence[Path], folder: Path, *, all_quantizers: bool
) -> dict[str, Any]:
    """By quantizer (all, or our own) what `judged` says, `seconds` of processor time to make it, and `bytes`."""
    features, found = features_of(network, dev, NUM_FRAMES), {}
    reference = network.load(SETTINGS)
    made = ours(network, speech, folder)
    if all_quantizers:
        made = itertools.chain(made, peers(network, features_of(network, speech), folder))
    float32: Made = ("float32", lambda: reference, 0.0, _size(_files(network)))
    for title, load, seconds, size in itertools.chain([float32], made):
        found[title] = {**judged(reference, load(), features), "seconds": seconds, "bytes": size}
        report(f"{title}: {found[title]}")
    return found


def networks(bundle: Bundle, others: Mapping[str, Bundle], folder: Path) -> Iterator[tuple[str, Bundle]]:
    """The demo model, it with outliers and with near ties, and others without and with outliers, by name."""
    yield PLAIN, bundle
    yield HARD, with_outliers(bundle, folder / HARD)
    yield "near ties", with_near_ties(bundle, folder / "ties")
    for name, other in others.items():
        yield name, other
        yield f"{name}, outliers", with_outliers(other, folder / name)


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each quantizer, one for each other network, and the errors of our int8."""
    found = results["networks"]
    plain, hard = found[PLAIN], found[HARD]

    def errors(own: Mapping[str, float] | None) -> list[str]:
        return [f"{own['log_probs_mean']:.3f}", f"{own['changed_tokens']:.1%}"] if own else ["—", ""]

    rows = [
        (
            title, *errors(plain.get(title)), *errors(hard.get(title)),
            *(f"{own[title]['bytes'] / 1e6:.1f}" if title in own else "" for own in (plain, hard)),
            *(f"{plain[title][key]:.0f}" if title in plain else "" for key in ("ms", "seconds")),
        )
        for title in dict.fromkeys([*plain, *hard])
    ]  # fmt: skip
    header = (
        "quantizer", "log-prob. error", "tokens", "with outliers", "tokens", "MB", "MB with outliers", "encoder, ms",
        "made in, s",
    )  # fmt: skip
    others = [
        (name, *itertools.chain(*(errors(own.get(title)) for title in OURS)))
        for name, own in found.items()
        if name not in (PLAIN, HARD)
    ]
    return {
        "table": table(header, rows),
        "others": table(("network", "int8", "tokens", "calibrated", "tokens"), others),
        **{
            f"{name}.{title.rpartition(' ')[2]}": " / ".join(errors(found[name][title]))
            for name in (PLAIN, HARD)
            for title in OURS
            if title in found[name]
        },
        "recordings": str(results["recordings"]),
        "calibrated": str(results["calibrated"]),
        "static": f"{STATIC_FRAMES / 100:.0f}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("studies.quantizers", __doc__)
    for name, kind in (("bundle", "folder"), ("speech", "list of recordings"), ("dev", "list of recordings")):
        parser.add_argument(name, type=Path, help=kind)
    parser.add_argument("others", type=named, nargs="*", metavar="NAME=BUNDLE", help="folders of other bundles")
    parser.add_argument("--results", type=Path, metavar="JSON", help="file for the results")
    args = parser.parse_args(arguments)
    speech, dev = ([recording.path for recording in read_recordings(own)] for own in (args.speech, args.dev))
    bundle, others = Bundle.open(args.bundle), {name: Bundle.open(other) for name, other in args.others}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, network in networks(bundle, others, Path(folder)):
            report(f"network: {name}")
            own = Path(folder) / "made" / name
            own.mkdir(parents=True)
            found[name] = measure(network, speech, dev, own, all_quantizers=name in (PLAIN, HARD))
    recordings = len(features_of(bundle, dev, NUM_FRAMES))
    results = {"networks": found, "recordings": recordings, "calibrated": len(speech)}
    publish(args.bundle, results, values, args.results)


if __name__ == "__main__":
    run_script(main)
