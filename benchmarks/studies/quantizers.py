"""How do other quantizers compare with ours, also on networks that are hard to quantize?

    U2MOE_KERNELS=onnxruntime python -m u2moe.benchmarks.studies.quantizers BUNDLE SPEECH.tsv DEV.tsv [NAME=BUNDLE ...]

Quantizers receive the encoder and the CTC head, those of other projects as graphs of plain operators, and the
recordings of SPEECH.tsv for calibration. Damage is measured on DEV.tsv, with full context and without native kernels.
Olive and Neural Compressor take part if installed (olive-ai, onnx-neural-compressor, prettytable, schema).

A hard network computes the same float32 results as the original, bit for bit, but one in a hundred of its channels is
32 to 256 times as large. Our recipes also quantize hard versions of the bundles NAME=BUNDLE, and a variant of BUNDLE
whose routers hardly distinguish experts. For bundles with a limit on damage or size, the damage in both passes is
measured on the first two minutes of SPEECH.tsv, and on DEV.tsv, which is held out.
"""

import importlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from u2moe.benchmarks.instruments.statistics import show_progress
from u2moe.benchmarks.results.files import publish
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.studies.shared.script import named, script, study_parser
from u2moe.quantize import Goal, quantize_bundle, recipe
from u2moe.quantize.comparison import Estimate, compare
from u2moe.quantize.layers import expert_layers
from u2moe.quantize.recordings import features_of
from u2moe.quantize.report import output_errors
from u2moe.quantize.smoothing import rewritten_bundle, scale, sites_of
from u2moe.runtime import AudioError, Bundle, Model, QuantizationError, ctc_greedy_search
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.graph.file import array_of
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import DEFAULT_PROVIDER, SessionSettings
from u2moe.runtime.text.word_errors import edit_distance

GRAPHS = ("encoder", "ctc")
SETTINGS = SessionSettings(num_threads=1, kernels="onnxruntime")
NUM_TIMINGS, STATIC_FRAMES, NUM_FRAMES = 3, 3000, 6000
"""Timings of the longest recording; frames for static calibration, joined as histograms need it, and for judging."""
LEAST, MOST = 5, 8  # exponents of the outlier factors, which are 32 to 256
NEAR = 1 / 64  # factor that shrinks the differences between router weights of four experts, for near ties
PLAIN, HARD = "plain", "hard"
TITLES = {HARD: "demo model, outliers", "near ties": "demo model, near ties"}
MAX_DAMAGE = 0.005
OURS = {"int8": (False, None), "int8, calibrated": (True, None), "int8, repaired": (True, Goal(max_damage=MAX_DAMAGE))}
"""Variants of int8: whether it is calibrated, and its goal, for which harmful layers stay in 16 bits."""
LIMITS = {
    "--max-damage 0.5": (PLAIN, "int4", Goal(max_damage=0.005)),
    "--recipe int8 --max-damage 0.5": (PLAIN, "int8", Goal(max_damage=0.005)),
    "the same, outliers": (HARD, "int8", Goal(max_damage=0.005)),
    "--max-damage 2": (PLAIN, "int4", Goal(max_damage=0.02)),
    "--max-size 9": (PLAIN, "int4", Goal(max_bytes=9e6)),
}
"""By title: a network, the format with which the search for a bundle starts, and the limit for the bundle."""
CHOSEN_FRAMES, KEPT_FRAMES = 12_000, 60_000  # maximum frames of SPEECH.tsv and DEV.tsv to judge limits
COSTS = ("bytes", 1e6, 1), ("ms", 1, 0), ("seconds", 1, 0)
Frames = np.ndarray[Any, np.dtype[np.float32]]


class Feeds(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Iterator over the stored inputs of a graph, in the form that onnxruntime's calibration expects."""

    def __init__(self, feeds: Sequence[Mapping[str, Any]]) -> None:
        self._all = feeds
        self.rewind()

    def get_next(self) -> Mapping[str, Any] | None:
        """Return the next inputs, or None at the end."""
        return next(self._feeds, None)

    def rewind(self) -> None:
        """Start again from the first inputs."""
        self._feeds = iter(self._all)


Make = Callable[[Path, Path, Feeds], object]  # quantizes a file to a file, with inputs of the graph


def _static(method: str) -> Make:
    chosen = {"op_types_to_quantize": ["MatMul", "Gemm", "Conv"], "per_channel": True}
    chosen |= {"weight_type": quantization.QuantType.QInt8, "calibrate_method": quantization.CalibrationMethod[method]}
    return lambda source, target, reader: quantization.quantize_static(source, target, reader, **chosen)


def _blocks(source: Path, target: Path, _: Feeds, bits: int) -> None:
    tool = MatMulNBitsQuantizer(onnx.load(source), bits=bits, block_size=32, is_symmetric=True, accuracy_level=4)
    tool.process()
    tool.model.save_model_to_file(str(target), use_external_data_format=False)


def _olive(source: Path, target: Path, _: Feeds, module: str, kind: str) -> None:
    own = getattr(importlib.import_module(f"olive.passes.onnx.{module}_quantization"), kind)
    passes, models = map(importlib.import_module, ("olive.passes.olive_pass", "olive.model"))
    chosen = passes.create_pass_from_dict(own, {"block_size": 32}, disable_search=True)
    made = chosen.run(models.ONNXModelHandler(str(source)), str(target.with_suffix("")))
    Path(made.model_path).replace(target)


def _compensated(source: Path, target: Path, reader: Feeds) -> None:
    own = importlib.import_module("onnx_neural_compressor.quantization.algorithm_entry")
    own.data_reader.CalibrationDataReader.register(Feeds)
    onnx.save(own.gptq_quantize_entry(str(source), own.config.GPTQConfig(), reader), target)


PEERS: Mapping[str, Make] = {
    "quantize_dynamic": lambda source, target, _: quantization.quantize_dynamic(source, target, per_channel=True),
    **{f"quantize_static, {name}": _static(name) for name in ("MinMax", "Percentile", "Entropy")},
    **{f"MatMulNBits, {bits} bits": partial(_blocks, bits=bits) for bits in (8, 4)},
    "Olive, RTN, 4 bits": partial(_olive, module="rtn", kind="OnnxBlockWiseRtnQuantization"),
    "Olive, k-quant, 4 bits": partial(_olive, module="kquant", kind="OnnxKQuantQuantization"),
    "Neural Compressor, GPTQ, 4 bits": _compensated,
}


class _Plain:
    """Session that runs a graph of plain operators and stores the inputs of all runs."""

    def __init__(self, file: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self._session = onnxruntime.InferenceSession(file, options, providers=[DEFAULT_PROVIDER])
        self._names = [output.name for output in self._session.get_outputs()]
        self.feeds: list[Mapping[str, Any]] = []

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.feeds.append(dict(feeds))
        return dict(zip(self._names, self._session.run(self._names, dict(feeds)), strict=True))


def plain_model(bundle: Bundle, files: Sequence[Path]) -> tuple[Model, list[_Plain]]:
    """Load the encoder and the CTC head from graphs of plain operators. Return the model and its sessions."""
    sessions = [_Plain(file) for file in files]
    encoder, ctc = (cast("Session", session) for session in sessions)
    return Model(bundle.manifest, encoder, ctc, None), sessions


def with_outliers(bundle: Bundle, folder: Path) -> Bundle:
    """Return an equivalent network with a few large channels at every site that `sites_of` returns."""
    random = np.random.default_rng(0)

    def add(models: Sequence[ir.Model]) -> None:
        for site in sites_of(*models):
            exponents = np.zeros(len(site.columns), np.int64)
            number = max(1, len(exponents) // 100)
            chosen = random.choice(len(exponents), number, replace=False)
            exponents[chosen] = -random.integers(LEAST, MOST + 1, number)
            scale(site, exponents)

    return rewritten_bundle(bundle, folder, add)


def with_near_ties(bundle: Bundle, folder: Path) -> Bundle:
    """Return a bundle whose routers hardly distinguish the experts in each group of four: 0 to 3, 4 to 7 and so on."""

    def tie(model: ir.Model) -> None:
        for layer in expert_layers(model):
            gate = array_of(layer.gate)
            first = gate[:, np.arange(gate.shape[1]) // 4 * 4]
            layer.gate.const_value = ir.tensor(first + (gate - first) * np.float32(NEAR), name=layer.gate.name)

    return rewritten_bundle(bundle, folder, lambda models: [*map(tie, models)])


def judged(reference: Model, model: Model, features: Sequence[Frames]) -> dict[str, float]:
    """Return log-probability error, share of changed greedy tokens, and CPU ms to encode the longest recording."""

    def tokens(own: Model) -> list[list[int]]:
        return [ctc_greedy_search(own.ctc(own.encode(frames))).tokens for frames in features]

    expected, longest, seconds = tokens(reference), max(features, key=len), []
    for _ in range(NUM_TIMINGS + 1):
        start = time.process_time()
        model.encode(longest)
        seconds.append(time.process_time() - start)
    return {
        "log_probs_mean": output_errors(reference, model, features)["log_probs_mean"],
        "changed_tokens": sum(map(edit_distance, expected, tokens(model))) / sum(map(len, expected)),
        "ms": 1000 * statistics.median(seconds[1:]),
    }


def peers(bundle: Bundle, recordings: Sequence[Frames], features: Sequence[Frames], folder: Path) -> dict[str, Any]:
    """Return the results of other projects' quantizers, as those of `ours` without `kept`; or `failed`, the message."""
    plain, reference = [folder / f"{name}.onnx" for name in GRAPHS], bundle.load(SETTINGS)
    found: dict[str, Any] = {}
    for file in plain:
        onnx.save(onnx.inliner.inline_local_functions(onnx.load(bundle.path / file.name)), file)
    model, sessions = plain_model(bundle, plain)
    model.ctc(model.encode(np.concatenate(recordings)[:STATIC_FRAMES]))
    for title, make in PEERS.items():
        files, start = [folder / title / file.name for file in plain], time.process_time()
        files[0].parent.mkdir()
        try:
            for source, target, session in zip(plain, files, sessions, strict=True):
                make(source, target, Feeds(session.feeds))
            costs = {"seconds": time.process_time() - start, "bytes": sum(file.stat().st_size for file in files)}
            found[title] = {**judged(reference, plain_model(bundle, files)[0], features), **costs}
        except Exception as error:  # noqa: BLE001 - other projects may raise any error
            found[title] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        show_progress(f"{title}: {found[title]}")
    return found


def ours(bundle: Bundle, speech: Sequence[Path], features: Sequence[Frames], folder: Path) -> dict[str, Any]:
    """Return, for each variant, the results of `judged`, CPU `seconds`, `bytes`, and `kept`, layers in 16 bits.

    If a goal cannot be met or verified, the variant's entry contains only `failed`, the error message.
    """
    reference = bundle.load(SETTINGS)
    found: dict[str, dict[str, Any]] = {}
    found["float32"] = {**judged(reference, reference, features), "seconds": 0.0, "bytes": _size(bundle), "kept": 0}
    for title, (calibrated, goal) in OURS.items():
        start, chosen = time.process_time(), recipe("int8", calibration=speech if calibrated else ())
        try:
            made, _ = quantize_bundle(bundle.path, folder / title, chosen, goal=goal)
        except (AudioError, QuantizationError) as error:  # the limit cannot be met or cannot be verified
            found[title] = {"failed": str(error)[:200]}
        else:
            costs = {"seconds": time.process_time() - start, "bytes": _size(made)}
            kept = len(made.manifest.quantization.get("exceptions", {}))
            found[title] = {**judged(reference, made.load(SETTINGS), features), **costs, "kept": kept}
        show_progress(f"{title}: {found[title]}")
    return found


def limited(bundle: Bundle, name: str, lists: Mapping[str, Sequence[Path]], folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield the title, damage and costs of a bundle made for each limit of a network with the first of `lists`."""
    reference, limits = bundle.load(SETTINGS), dict(zip(lists, (CHOSEN_FRAMES, KEPT_FRAMES), strict=True))
    for title, (_, kind, goal) in ((title, own) for title, own in LIMITS.items() if own[0] == name):
        start, groups = time.process_time(), {"output_layers": "int4"} if kind == "int4" else {}
        chosen = recipe(kind, groups, calibration=next(iter(lists.values())))
        try:
            made, _ = quantize_bundle(bundle.path, folder / title, chosen, goal=goal)
        except (AudioError, QuantizationError) as error:
            yield title, {"failed": str(error)}
            continue
        found = {"claimed": made.manifest.quantization["goal"], "seconds": time.process_time() - start}
        found["bytes"], model = sum(file.stat().st_size for file in made.path.iterdir()), made.load(SETTINGS)
        for own, files in lists.items():
            found[own] = compare(reference, model, features_of(bundle, files, limits[own])).data()
        yield title, found


def _size(bundle: Bundle) -> int:
    return sum(file.stat().st_size for graph in GRAPHS for file in bundle.path.glob(f"{graph}.onnx*"))


def networks(bundle: Bundle, others: Mapping[str, Bundle], folder: Path) -> Iterator[tuple[str, Bundle]]:
    """Yield names and networks: `bundle` unchanged, with outliers and with near ties, then `others` with outliers."""
    yield PLAIN, bundle
    yield HARD, with_outliers(bundle, folder / HARD)
    yield "near ties", with_near_ties(bundle, folder / "ties")
    for name, other in others.items():
        yield f"{name}, outliers", with_outliers(other, folder / name)


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for pages: tables, the errors of each variant in `OURS`, and the number of recordings."""
    found = results["networks"]

    def errors(own: Mapping[str, float] | None) -> list[str]:
        return [f"{own['log_probs_mean']:.3f}", f"{own['changed_tokens']:.1%}"] if own and "bytes" in own else ["—", ""]

    def costs(own: Mapping[str, float]) -> list[str]:
        return [f"{own[key] / unit:.{digits}f}" if key in own else "" for key, unit, digits in COSTS]

    rows = [
        (f"u2moe {title}" if title in OURS else title, *errors(own), *errors(found[HARD].get(title)), *costs(own))
        for title, own in found[PLAIN].items()
    ]
    header = ("quantizer", "log-prob. error", "changed", "with outliers", "changed", "MB", "encoder, ms", "time, s")
    shown = {"table": table(header, rows), "static": f"{STATIC_FRAMES / 100:.0f}", "damage": f"{100 * MAX_DAMAGE:g}"}
    others = []
    for name, own in found.items():
        cells = [errors(own.get(title)) for title in OURS]
        if name in (PLAIN, HARD):
            names = (f"{name}.{title.rpartition(' ')[2]}" for title in OURS)
            shown |= dict(zip(names, map(" / ".join, cells), strict=True))
        if name != PLAIN:
            others.append((TITLES.get(name, name), *itertools.chain(*cells), *_kept(own)))
    columns = ("int8", "changed", "calibrated", "changed", "repaired", "changed", "16-bit layers", "MB")
    shown["others"] = table(("network", *columns), others)
    limits = [(f"`{title}`", *_limit(own)) for title, own in results.get("limits", {}).items()]
    of_limits = ("run", "claimed, at most", "two minutes", "held out: greedy", "second pass", "MB", "time, s")
    shown |= {key: str(results[key]) for key in ("recordings", "calibrated")}
    return {**shown, "limits": table(of_limits, limits)}


def _limit(own: Mapping[str, Any]) -> list[str]:
    if "failed" in own:
        return [own["failed"], *[""] * 5]
    passes = (own[each]["changed_tokens"].values() for each in ("chose", "kept back"))
    chose, kept = ([Estimate(**found) for found in each] for each in passes)
    claimed = f"{own['claimed']['changed_tokens']:.2%}, {own['claimed']['changed_tokens_at_most']:.2%}"
    shown = " / ".join(f"{found.value:.2%}" for found in chose)
    return [claimed, shown, *map(str, kept), f"{own['bytes'] / 1e6:.1f}", f"{own['seconds']:.0f}"]


def _kept(own: Mapping[str, Any]) -> list[str]:
    repaired = own.get(list(OURS)[-1])
    if repaired is None or "failed" in repaired:
        return ["", ""]
    return [str(repaired["kept"]), f"{repaired['bytes'] / 1e6:.1f} of {own['float32']['bytes'] / 1e6:.1f}"]


@script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("quantizers", __doc__)
    for name, kind in (("bundle", "folder"), ("speech", "list of recordings"), ("dev", "list of recordings")):
        parser.add_argument(name, type=Path, help=kind)
    about = "bundles; only their hard versions are quantized"
    parser.add_argument("others", type=named, nargs="*", metavar="NAME=BUNDLE", help=about)
    args = parser.parse_args(arguments)
    speech, dev = ([recording.path for recording in read_recordings(own)] for own in (args.speech, args.dev))
    bundle, others = Bundle.open(args.bundle), {name: Bundle.open(other) for name, other in args.others}
    found: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, network in networks(bundle, others, Path(folder)):
            show_progress(f"network: {name}")
            own, features = Path(folder) / "made" / name, features_of(network, dev, NUM_FRAMES)
            own.mkdir(parents=True)
            found[name] = ours(network, speech, features, own)
            if name in (PLAIN, HARD):
                found[name] |= peers(network, features_of(network, speech), features, own)
                limits.update(limited(network, name, {"chose": speech, "kept back": dev}, own))
    recordings = len(features_of(bundle, dev, NUM_FRAMES))
    results = {"networks": found, "limits": limits, "recordings": recordings, "calibrated": len(speech)}
    publish(args.results, results, values, bundle=args.bundle)
