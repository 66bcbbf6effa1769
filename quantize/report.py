"""Comparison of a quantized bundle with its float32 bundle: bytes, errors, routing, word error rate, speed.

Everything is measured on the written files. A packed bundle is measured before packing, except for its size.
"""

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from u2moe.quantize.arithmetic import Array, relative_error
from u2moe.quantize.changes import what_changes
from u2moe.quantize.damage import describe_damage
from u2moe.quantize.layers import Change
from u2moe.quantize.observed import ExpertInputs, LeanSettings
from u2moe.quantize.packing import stored_array
from u2moe.quantize.passes.halves import read_single
from u2moe.quantize.picture import bar_picture
from u2moe.quantize.progress import Progress
from u2moe.quantize.recordings import read_features
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.corpus.lists import Recording
from u2moe.runtime.graph.file import group_of
from u2moe.runtime.model.model import Model
from u2moe.runtime.options import DecodingOptions, SearchMethod
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.text.word_errors import WordErrors, edit_distance

Front = Sequence[Mapping[str, Any]]
"""Choices ordered by size. Each has `bytes`, `divergence` in nats per frame, `at_most`, and `written` (whether a bundle
was written). `at_most` is the upper limit of the interval for the share of changed tokens. A choice is allowed if
`--max-damage` is at least `at_most`."""
NUM_TIMINGS = 9
NUM_LEFT_CHUNKS = 4  # number of left chunks when streams are timed; chunks have the bundle's default size


def build_report(
    reference: Bundle,
    quantized: Bundle,
    changes: Mapping[str, Change],
    audio: Sequence[tuple[Path, Array]],
    recordings: Sequence[Recording],
    progress: Progress,
) -> dict[str, Any]:
    """Return a comparison of `quantized` with its float32 bundle, `reference`, as plain data for `report.json`.

    `changes` are the replaced weights, by the name of the new weight. Outputs, routing and speed are compared on
    `audio`: files of real speech with their features, float32 [frames, mel]. If there are no `recordings`, which have
    transcripts, the report has no section on word errors. `progress` is called with a line for each section.
    """
    progress("weights")
    report: dict[str, Any] = {"recipe": quantized.manifest.quantization, "onnxruntime": onnxruntime.__version__}
    report |= {"bytes": compare_bytes(reference, quantized), "weight_error": weight_errors(quantized, changes)}
    files, features = zip(*audio, strict=True)
    progress("routing")
    report["routing_agreement"] = routing_agreement(reference, quantized, features)
    models = reference.load(LeanSettings()), quantized.load(LeanSettings())
    progress("outputs on real features")
    report["outputs"] = output_errors(*models, features)
    noisy = [frames for _, frames in read_features(reference, files, is_noisy=True)]
    report["changes"] = what_changes(models, features, files, noisy)
    if recordings:
        recognizers = [Recognizer(*each) for each in zip((reference, quantized), models, strict=True)]
        report["text"] = compare_text(recognizers, recordings, progress)
    progress("speed")
    report["speed"] = compare_speed(*models, max(features, key=len))
    return report


def compare_bytes(reference: Bundle, quantized: Bundle) -> dict[str, Any]:
    """Return the bytes `before` and `after` for the weights of each of the `groups` and for all `files`, and `ratio`.

    The ratio is that of all files: `after` divided by `before`.
    """
    groups: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for index, bundle in enumerate((reference, quantized)):
        for graph in bundle.manifest.model.graphs():
            for value in ir.load(bundle.path / graph.file).graph.initializers.values():
                if value.const_value is not None:
                    groups[group_of(value)][index] += value.const_value.nbytes
    totals = [sum(file.size for file in bundle.manifest.files.values()) for bundle in (reference, quantized)]
    result = {name: {"before": before, "after": after} for name, (before, after) in sorted(groups.items())}
    return {"groups": result, "files": {"before": totals[0], "after": totals[1]}, "ratio": totals[1] / totals[0]}


def weight_errors(quantized: Bundle, changes: Mapping[str, Change]) -> dict[str, Any]:
    """Return, for each group, the relative error of all its stored weights together, and that of its worst weight."""
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    worst: dict[str, float] = defaultdict(float)
    for graph in quantized.manifest.model.graphs():
        initializers = read_single(quantized.path / graph.file).graph.initializers
        for name, change in changes.items():
            if name not in initializers or change.group == "other":
                continue
            original, stem = change.original(), name.rpartition(".")[0]
            names = [name, *(f"{stem}.{part}" for part in change.parts)]
            stored = change.restored(*(stored_array(initializers[each]) for each in names))
            squares[change.group][0] += float(np.square(stored - original, dtype=np.float64).sum())
            squares[change.group][1] += float(np.square(original, dtype=np.float64).sum())
            worst[change.group] = max(worst[change.group], relative_error(original, stored))
    return {
        group: {"relative": (error / size) ** 0.5 if size else 0.0, "worst": worst[group]}
        for group, (error, size) in sorted(squares.items())
    }


def output_errors(reference: Model, quantized: Model, features: Sequence[Array]) -> dict[str, float]:
    """Return errors of encoder output and log-probabilities in full context, and the share of equal best tokens."""
    outputs = [(reference.encode(frames), quantized.encode(frames)) for frames in features]
    log_probs = [(reference.ctc(pair[0]), quantized.ctc(pair[1])) for pair in outputs]
    expected, found = (np.concatenate(part) for part in zip(*log_probs, strict=True))
    # the best token always counts, because an untrained network with a large vocabulary has no token above 1 %
    likely = (expected > np.log(0.01)) | (expected == expected.max(axis=1, keepdims=True))
    return {
        "frames": len(expected),
        "encoder_relative": relative_error(*(np.concatenate(part) for part in zip(*outputs, strict=True))),
        "log_probs_mean": float(np.abs(expected - found)[likely].mean()),
        "log_probs_max": float(np.abs(expected - found)[likely].max()),
        "same_best_token": float((expected.argmax(axis=1) == found.argmax(axis=1)).mean()),
    }


def routing_agreement(reference: Bundle, quantized: Bundle, features: Sequence[Array]) -> dict[str, float]:
    """Return, for each mixture of experts in the encoder, the share of tokens whose set of experts is unchanged."""
    chosen: list[dict[str, Array]] = []
    for bundle in (reference, quantized):  # one after the other, to save memory
        router = ExpertInputs(bundle)
        found = [router.experts(frames) for frames in features]
        chosen.append({layer: np.concatenate([own[layer] for own in found if own]) for layer in router.layers})
    return {layer: float((chosen[1][layer] == own).all(axis=1).mean()) for layer, own in chosen[0].items()}


def compare_text(
    recognizers: Sequence[Recognizer], recordings: Sequence[Recording], progress: Progress
) -> dict[str, Any]:
    """Return word error rates and token agreement for each search, with full context and, if possible, in chunks."""
    model = recognizers[0].model
    searches: tuple[SearchMethod, ...] = ("ctc_greedy", "ctc_prefix_beam", "attention_rescoring")
    searches = searches if model.has_decoder else searches[:2]
    result: dict[str, Any] = {}
    for chunk_size, search in itertools.product((None, 16) if model.config.streaming else (None,), searches):
        name = f"{search}, {'full context' if chunk_size is None else f'chunk {chunk_size}'}"
        progress(f"text: {name}")
        options = DecodingOptions(search=search, chunk_size=chunk_size)
        errors, num_different, num_tokens = (WordErrors(), WordErrors()), 0, 0
        for recording in recordings:
            transcripts = [recognizer.transcribe(recording.path, options=options) for recognizer in recognizers]
            tokens = [[token for segment in item.segments for token in segment.tokens] for item in transcripts]
            for count, transcript in zip(errors, transcripts, strict=True):
                count.add(recording.transcript, transcript.text)
            num_different += edit_distance(*tokens)
            num_tokens += len(tokens[0])
        rates = {"wer_before": errors[0].rate, "wer_after": errors[1].rate}
        agreement = 1 - num_different / max(num_tokens, 1)
        result[name] = {"num_words": errors[0].num_words, **rates, "token_agreement": agreement}
    return result


def compare_speed(reference: Model, quantized: Model, frames: Array) -> dict[str, Any]:
    """Return both encoders' median times in seconds on one thread, the speedup, and whether the times differ."""
    cases: dict[str, tuple[int | None, int]] = {"full context": (None, -1)}
    if reference.config.streaming:
        size = reference.config.stream_chunk_size
        cases[f"chunk {size}, left {NUM_LEFT_CHUNKS}"] = size, NUM_LEFT_CHUNKS
    result = {}
    for name, chunks in cases.items():
        times = encoder_times([reference, quantized], frames, chunks, NUM_TIMINGS)
        before, after = map(statistics.median, times)
        low, high = (statistics.quantiles(series, n=4) for series in times)
        differs = low[2] < high[0] or high[2] < low[0]
        result[name] = {"before_s": before, "after_s": after, "speedup": before / after, "differs": differs}
    return {"feature_frames": len(frames), "encoder": result}


def encoder_times(
    models: Sequence[Model], frames: Array, chunks: tuple[int | None, int], repetitions: int
) -> list[list[float]]:
    """Return each model's encoder times in seconds. `chunks`: chunk size and number of left chunks."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(repetitions + 1):  # the models take turns
        for series, model in zip(times, models, strict=True):
            start = time.perf_counter()
            model.encode(frames, *chunks)
            series.append(time.perf_counter() - start)
    return [series[1:] for series in times]


def describe_bytes(sizes: Mapping[str, Any], errors: Mapping[str, Any]) -> list[str]:
    """Return the results of `compare_bytes` and `weight_errors` as the lines of a table."""
    head = f" {'error':>8} {'worst':>8}" if errors else ""
    lines = [f"{'weights':24} {'before':>14} {'after':>14} {'ratio':>7}{head}"]
    for group, size in {**sizes["groups"], "all files": sizes["files"]}.items():
        error = errors.get(group)
        shown = f" {error['relative']:8.2%} {error['worst']:8.2%}" if error else ""
        ratio = size["after"] / size["before"] if size["before"] else 1.0
        lines.append(f"{group:24} {size['before']:14,} {size['after']:14,} {ratio:7.1%}{shown}")
    return lines


def describe(report: Mapping[str, Any]) -> str:
    """Return the report as text, with a table of sizes."""
    lines = describe_bytes(report["bytes"], report["weight_error"])
    if calibration := report["recipe"].get("calibration"):
        lines.append(
            f"calibrated with {calibration['seconds']:.0f} s of audio: {calibration['compensated_products']} matrices, "
            f"but not the {calibration['plain_products']} that received fewer tokens than they have inputs"
        )
    if damage := report.get("damage"):
        lines += [*describe_damage(damage), *describe_front(damage.get("front", []))]
        lines += [
            f"{step['format']} for {step['layer']}: {step['gain']:.4f} nats less, {step['bytes'] / 1e6:.2f} MB more"
            for step in damage.get("steps", [])
        ]
    outputs = report["outputs"]
    lines.append(
        f"on {outputs['frames']} encoder frames: encoder output differs by {outputs['encoder_relative']:.2%}, "
        "log-probabilities of likely tokens (above 1%) by "
        f"{outputs['log_probs_mean']:.3f} (at most {outputs['log_probs_max']:.2f}), "
        f"best token unchanged in {outputs['same_best_token']:.2%}"
    )
    if agreement := report["routing_agreement"]:
        worst, mean = min(agreement, key=agreement.__getitem__), statistics.fmean(agreement.values())
        lines.append(f"tokens with unchanged experts: {mean:.2%}, fewest in {worst}: {agreement[worst]:.2%}")
    lines += [
        f"{name:38} WER {item['wer_before']:7.2%} -> {item['wer_after']:7.2%} of {item['num_words']} words, "
        f"token agreement {item['token_agreement']:.2%}"
        for name, item in report.get("text", {}).items()
    ]
    for name, item in report["speed"]["encoder"].items():
        verdict = "about equally fast" if not item["differs"] else "faster" if item["speedup"] > 1 else "SLOWER"
        lines.append(
            f"encoder, {name:22} {item['before_s'] * 1e3:8.1f} ms -> {item['after_s'] * 1e3:8.1f} ms: "
            f"{item['speedup']:.2f} x, {verdict} on this machine"
        )
    return "\n".join(lines)


def describe_front(front: Front) -> list[str]:
    """Return a table as lines: each choice with its size, divergence and smallest `--max-damage` that allows it."""
    lines = ["choices of the search: size, divergence, and the smallest --max-damage that allows them"] * bool(front)
    for point in front:
        share = ("" if point["written"] else "about ") + f"{point['at_most']:.2%}"
        lines.append(f"{point['bytes'] / 1e6:9.2f} MB {point['divergence']:12.5f} nats per frame {share:>15}")
    return lines


def front_picture(front: Front, limit: float | None) -> str:
    """Draw a bar for each choice's share of changed tokens, in the order of `front`, and one for the limit."""
    shares = [(f"{point['bytes'] / 1e6:.2f} MB", 0 if point["written"] else 1, point["at_most"]) for point in front]
    shares += [] if limit is None else [("limit", 2, limit)]
    rows = [(name, [(number, 100 * share, f"{share:.2%}")]) for name, number, share in shares]
    title = "changed tokens in %, upper limit of the interval, by total file size"
    return bar_picture(title, ["written and compared", "estimated from the divergence", "--max-damage"], rows)
