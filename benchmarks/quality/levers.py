"""What do the levers gain that cost accuracy? Skipped experts and less left context: word errors and encoder time.

    python -m u2moe.benchmarks.quality.levers BUNDLE --manifest TEST.tsv ... [--output levers.json] [--times]

BUNDLE is a float32 bundle; it is quantized once for every threshold below which experts are skipped (`u2moe quantize
--skip-expert-below`). All settings recognise the same recordings, and their encoders are timed in turn on some of them.
Words can be counted on a busy machine: `--times` then replaces the times in the output alone, in a minute.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.instruments.probe import Mode
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, spread_of, timed
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS
from u2moe.benchmarks.results.files import read_json
from u2moe.benchmarks.results.markdown import quartiles, table
from u2moe.benchmarks.results.provenance import of_bundle, publish
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.quantize.config import FLOAT32, RECIPES, recipe
from u2moe.quantize.quantizer import quantize_bundle
from u2moe.quantize.report import features_of
from u2moe.quantize.routing import ExpertInputs, RoutedLayer
from u2moe.runtime import Bundle, DecodingOptions, Model, Recognizer
from u2moe.runtime.text.word_errors import Recording, WordErrors, read_manifest

Array = npt.NDArray[Any]
Progress = Callable[[str], None]

LIMITS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Thresholds for the weight of an expert; with two experts, above 0.5 no token uses the second."""
LEFT_CHUNKS = (4, 2, 1, -1)
TIMED_FRAMES = 3000
"""Minimum feature frames on which encoders are timed, if the recordings have that many."""
COST_LIMIT = 0.02
"""Largest relative increase of word errors that the lever may cost, with full context."""
ROUTED_FRAMES = 60_000
ROUTED_RECORDINGS = 20
"""Maximum number of recordings, and of feature frames, for which the weights of experts are examined."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting to compare: a threshold below which experts are skipped, and the encoder's context."""

    skip_below: float
    mode: Mode


def settings(limits: Sequence[float], left_chunks: Sequence[int], *, streaming: bool) -> list[Setting]:
    """All thresholds with full context and in chunks, and all numbers of left chunks without skipped experts."""
    chunks = [Mode(chunk_size=CHUNK_SIZE, num_left_chunks=NUM_LEFT_CHUNKS)] if streaming else []
    found = [Setting(skip_below=limit, mode=mode) for mode in (Mode(), *chunks) for limit in limits]
    lefts = [Mode(chunk_size=CHUNK_SIZE, num_left_chunks=left) for left in left_chunks] if streaming else []
    return list(dict.fromkeys([*found, *(Setting(skip_below=0.0, mode=mode) for mode in lefts)]))


def second_share(layer: RoutedLayer, tokens: Array) -> Array:
    """Weight of the second expert of each token [tokens, dim] of a layer with at least two: [tokens]."""
    logits = np.sort(tokens @ layer.gate, axis=1)
    weights = np.exp(logits[:, -layer.top_k :] - logits[:, -1:])
    return np.asarray(weights[:, -2] / weights.sum(axis=1))


def skipped_shares(bundle: Bundle, recordings: Sequence[Recording], limits: Sequence[float]) -> dict[str, float]:
    """Share of the encoder's tokens whose second expert weighs less than each limit, with full context.

    This examines a bundle without skipping, because skipped experts change the inputs of later layers.
    """
    inputs = ExpertInputs(bundle)
    layers = {name: layer for name, layer in inputs.layers.items() if layer.top_k > 1}
    if not layers:
        return {}
    paths = [recording.path for recording in recordings[:ROUTED_RECORDINGS]]
    features = features_of(bundle, paths, ROUTED_FRAMES)
    tokens = (inputs.tokens(frames) for frames in features)
    found = [second_share(layer, x[name]) for x in tokens for name, layer in layers.items() if x]
    shares = np.concatenate(found) if found else np.zeros(0)
    return {f"{limit:g}": float((shares < limit).mean()) if len(shares) else 0.0 for limit in limits}


def measure(
    bundle: Path,
    sets: Mapping[str, Sequence[Recording]],
    folder: Path,
    *,
    recipe_name: str = "int8",
    limits: Sequence[float] = LIMITS,
    left_chunks: Sequence[int] = LEFT_CHUNKS,
    repetitions: int = 7,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Word errors and encoder times of all settings.

    Args:
        bundle: folder of a float32 bundle with experts.
        sets: recordings with transcripts, by the name of their list.
        folder: where to write the bundles.
        recipe_name: their recipe.
        limits: thresholds below which experts are skipped; 0 (no skipping) is always included.
        left_chunks: chunks of left context; -1: all.
        repetitions: number of measurements of each encoder.
        progress: called with a line for each step.

    Returns:
        recipe; skipped, see `skipped_shares`; settings: an entry for each, the first of a mode the one that skips
        none: `skip_below`, `mode`, `words` by set (`num_words`, `num_errors`, `wer`) and of `all` together, and
        `encoder_s`, a spread for `timed_frames` feature frames.

    Raises:
        BundleError: not a float32 bundle with at least two experts per token.
    """
    limits = sorted({0.0, *limits})
    bundles = {limit: make(bundle, folder, recipe_name, limit, progress) for limit in limits}
    models = {limit: made.load(num_threads=1) for limit, made in bundles.items()}
    wanted = settings(limits, left_chunks, streaming=models[0.0].config.streaming)
    words = {}
    for setting in wanted:
        progress(f"words: {label(setting)}")
        recognizer = Recognizer(bundles[setting.skip_below], models[setting.skip_below])
        words[setting] = count_words(recognizer, sets, setting.mode)
    recordings = [recording for own in sets.values() for recording in own]
    features = features_of(bundles[0.0], [recording.path for recording in recordings], TIMED_FRAMES)
    times = encoder_times(models, wanted, features, repetitions, progress)
    return {
        "recipe": recipe_name,
        "skipped": skipped_shares(bundles[0.0], recordings, limits),
        "timed_frames": sum(map(len, features)),
        "settings": [
            {"skip_below": setting.skip_below, "mode": setting.mode.name, "words": words[setting], **times[setting]}
            for setting in wanted
        ],
    }


def timed_again(
    results: Mapping[str, Any],
    bundle: Path,
    recordings: Sequence[Recording],
    folder: Path,
    *,
    left_chunks: Sequence[int] = LEFT_CHUNKS,
    repetitions: int = 7,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """The results of `measure` with other times: those of the same settings now.

    Args:
        results: see `measure`.
        bundle: folder of the float32 bundle that they are of.
        recordings: those of all sets, in their order.
        folder: where to write the bundles.
        left_chunks: chunks of left context, as they were; -1: all.
        repetitions: number of measurements of each encoder.
        progress: called with a line for each step.

    Raises:
        ValueError: the results have other settings.
    """
    limits = sorted({item["skip_below"] for item in results["settings"]})
    bundles = {limit: make(bundle, folder, results["recipe"], limit, progress) for limit in limits}
    models = {limit: made.load(num_threads=1) for limit, made in bundles.items()}
    wanted = settings(limits, left_chunks, streaming=models[0.0].config.streaming)
    had = [(item["mode"], item["skip_below"]) for item in results["settings"]]
    if had != [(setting.mode.name, setting.skip_below) for setting in wanted]:
        raise ValueError(f"words were counted with {had}, not with {', '.join(map(label, wanted))}")
    features = features_of(bundles[0.0], [recording.path for recording in recordings], TIMED_FRAMES)
    times = encoder_times(models, wanted, features, repetitions, progress)
    return {
        "recipe": results["recipe"],
        "skipped": results["skipped"],
        "timed_frames": sum(map(len, features)),
        "settings": [{**item, **times[own]} for item, own in zip(results["settings"], wanted, strict=True)],
    }


def encoder_times(
    models: Mapping[float, Model],
    wanted: Sequence[Setting],
    features: Sequence[Array],
    repetitions: int,
    progress: Progress,
) -> dict[Setting, dict[str, Any]]:
    """`encoder_s` of each setting, and how many times as `faster` it is than its `reference`, all timed in turn."""
    cases = {setting: timed(partial(encode, models[setting.skip_below], features, setting.mode)) for setting in wanted}
    seconds = interleaved(cases, repetitions, title="encoders", progress=progress)
    return {
        setting: {
            "encoder_s": Spread.of(found).data(),
            # the same recordings in the same round: other load on the machine affects both
            "faster": Spread.of(np.divide(seconds[reference(setting, wanted)], found).tolist()).data(),
        }
        for setting, found in seconds.items()
    }


def reference(setting: Setting, wanted: Sequence[Setting]) -> Setting:
    """The setting to compare with: the first one with chunks, or with full context, which skips no experts."""
    return next(other for other in wanted if other.mode.chunk_size == setting.mode.chunk_size)


def make(source: Path, folder: Path, recipe_name: str, limit: float, progress: Progress) -> Bundle:
    """The bundle for one threshold."""
    if recipe_name == FLOAT32 and not limit:
        return Bundle.open(source)
    progress(f"making a bundle that skips below {limit:g}")
    made, _ = quantize_bundle(source, folder / f"{limit:g}", recipe(recipe_name, skip_expert_below=limit))
    return made


def label(setting: Setting) -> str:
    """A setting in words."""
    return f"{setting.mode.name}, skip below {setting.skip_below:g}"


def count_words(recognizer: Recognizer, sets: Mapping[str, Sequence[Recording]], mode: Mode) -> dict[str, Any]:
    """Word errors of every set, and of all recordings together as "all"."""
    options = DecodingOptions(chunk_size=mode.chunk_size, num_left_chunks=mode.num_left_chunks)
    found, total = {}, WordErrors()
    for name, recordings in sets.items():
        errors = WordErrors()
        for recording in recordings:
            text = recognizer.transcribe(recording.path, options=options).text
            errors.add(recording.transcript, text)
        total.num_words += errors.num_words
        total.num_errors += errors.num_errors
        found[name] = _plain(errors)
    return {**found, "all": _plain(total)}


def _plain(errors: WordErrors) -> dict[str, Any]:
    return {"num_words": errors.num_words, "num_errors": errors.num_errors, "wer": round(errors.rate, 5)}


def encode(model: Model, features: Sequence[Array], mode: Mode) -> None:
    """Encode utterances one at a time."""
    for frames in features:
        model.encode(frames, mode.chunk_size, mode.num_left_chunks)


def best(results: Mapping[str, Any], cost_limit: float = COST_LIMIT) -> dict[str, float]:
    """The threshold that skips the most experts among those with an acceptable increase of word errors.

    Args:
        results: see `measure`; may be empty.
        cost_limit: largest relative increase of word errors with full context.

    Returns:
        `below`, the threshold; `tokens`, the share of tokens that skip an expert; `cost`, the relative increase of word
        errors, 0 where there are none at all. Empty if there is no such threshold.
    """
    settings = [item for item in results.get("settings", ()) if item["mode"] == Mode().name]
    errors = {item["skip_below"]: item["words"]["all"]["num_errors"] for item in settings}
    costs = {below: _increase(errors[0.0], number) for below, number in errors.items() if below}
    below = max((limit for limit, cost in costs.items() if cost <= cost_limit), default=None)
    if below is None:
        return {}
    return {"below": below, "tokens": results["skipped"][f"{below:g}"], "cost": costs[below]}


def _increase(before: int, after: int) -> float:
    """Relative increase of a number of errors; any error is infinitely more than none."""
    if not before:
        return math.inf if after else 0.0
    return (after - before) / before


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each setting, and the numbers of the best limit."""
    sets, rows = list(results["settings"][0]["words"]), []
    first: dict[bool, int] = {}
    for item in results["settings"]:
        errors = item["words"]["all"]["num_errors"]
        before = first.setdefault(item["mode"] == Mode().name, errors)
        cost = f"{(errors - before) / before:+.1%}" if before else f"{errors - before:+d}"
        share = results["skipped"].get(f"{item['skip_below']:g}", 0.0)
        rates = [f"{item['words'][name]['wer']:.2%}" for name in sets]
        times = quartiles(spread_of(item["encoder_s"], 1e3), 0), quartiles(spread_of(item["faster"]))
        rows.append((item["mode"], f"{item['skip_below']:g}", f"{share:.0%}", *rates, cost, *times))
    header = ("context", "skipped below", "tokens", *(f"WER {name}" for name in sets), "cost", "encoder, ms", "x")
    found = best(results)
    formats = {"below": "g", "tokens": ".0%", "cost": "+.1%"}
    return {
        "table": table(header, rows),
        "recipe": results["recipe"],
        "frames": str(results["timed_frames"]),
        **{name: f"{value:{formats[name]}}" for name, value in found.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = script_parser("quality.levers", __doc__)
    parser.add_argument("bundle", type=Path, help="folder of a float32 bundle with experts")
    parser.add_argument("--manifest", type=Path, nargs="+", required=True, help="lists of recordings: path<TAB>text")
    parser.add_argument("--recipe", choices=(*RECIPES, FLOAT32), default="int8", help="default: int8")
    parser.add_argument("--skip-below", type=float, nargs="+", default=list(LIMITS), metavar="WEIGHT")
    parser.add_argument("--left-chunks", type=int, nargs="+", default=list(LEFT_CHUNKS), help="-1: all")
    parser.add_argument("--at-most", type=int, metavar="N", help="use at most N recordings of each list")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--times", action="store_true", help="replace the times in the output, and keep its words")
    args = parser.parse_args(argv)
    sets = {file.stem: read_manifest(file)[: args.at_most] for file in args.manifest}
    options = {"left_chunks": args.left_chunks, "repetitions": args.repetitions, "progress": report}
    earlier = read_json(args.output) if args.times and args.output else {}
    if args.times and not of_bundle(args.bundle).items() <= earlier.items():
        parser.error(f"{args.output}: has no words of this bundle: count them without --times first")
    with tempfile.TemporaryDirectory() as folder:
        if args.times:
            recordings = [recording for own in sets.values() for recording in own]
            found = timed_again(earlier, args.bundle, recordings, Path(folder), **options)
        else:
            limits = args.skip_below
            found = measure(args.bundle, sets, Path(folder), recipe_name=args.recipe, limits=limits, **options)
    publish(args.bundle, found, values, args.output)
    return 0


if __name__ == "__main__":
    run_script(main)
