"""Damage by layer, the switched graphs that measure it, and better formats for damaging layers."""

import functools
import json
import os
import re
from dataclasses import replace
from unittest.mock import Mock
from xml.etree import ElementTree as ET

import numpy as np
import onnx_ir as ir
import pytest
from corpora import write_noise

from u2moe.export.random_checkpoint import random_config, write_random_checkpoint
from u2moe.quantize import Goal, comparison, damage, inspect_bundle, quantize_bundle, quantizer, recipe
from u2moe.quantize.comparison import Difference
from u2moe.quantize.damage import Damage, DamageMeter, LayerDamage, describe_damage
from u2moe.quantize.inspection import describe
from u2moe.quantize.observed import SwitchedGraph, SwitchedSession
from u2moe.quantize.passes.halves import read_single
from u2moe.quantize.recordings import features_of, read_audio
from u2moe.quantize.report import describe as describe_report
from u2moe.quantize.run import TEMPORARY, QuantizationRun, temporary_folder
from u2moe.quantize.search import FormatSearch, Ladder
from u2moe.quantize.smoothing import rewritten_bundle, scale, sites_of
from u2moe.runtime import AudioError, Bundle, QuantizationError, ctc_greedy_search
from u2moe.runtime.cli import main
from u2moe.runtime.corpus.lists import Recording
from u2moe.runtime.model.encoder import Encoder
from u2moe.runtime.text.word_errors import edit_distance

pytestmark = pytest.mark.slow
HURT, HURT_VALUE = "encoder.encoders.1.conv_module", "encoder/encoders.1/norm_conv/AddNormalization:1"


@pytest.fixture(scope="module")
def version(small_bundle, tmp_path_factory):
    """Return a function from a recipe's name to the small bundle quantized by it."""
    return functools.cache(
        lambda name: quantize_bundle(small_bundle.path, tmp_path_factory.mktemp(name) / "bundle", recipe(name))[0]
    )


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return sorted(write_noise(tmp_path_factory.mktemp("recordings"), 3, 16_000).iterdir())


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough for limits on damage: a quarter chooses, and half of the rest judges."""
    return sorted(write_noise(tmp_path_factory.mktemp("many"), 12, 32_000).iterdir())


@pytest.fixture(scope="module")
def features(small_bundle, recordings):
    return features_of(small_bundle, recordings)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Measure damage with onnxruntime only."""
    monkeypatch.setenv("U2MOE_KERNELS", "onnxruntime")


@pytest.fixture(scope="module")
def hurt(small_bundle, features, tmp_path_factory):
    """Return a bundle with outliers of 512 times the size, it in int8, and the measured damage. They are before the
    convolution of block 1, and in the encoder's output, which the CTC head and the decoders' cross attention read."""
    folder = tmp_path_factory.mktemp("hurt")

    def add_outliers(models):
        for site in sites_of(*models):
            if site.name.startswith(("encoder/encoders.1/norm_conv", "encoder_out")):
                scale(site, np.where(np.arange(len(site.columns)) == 5, -9, 0))

    source = rewritten_bundle(small_bundle, folder / "float32", add_outliers)
    versions = source, quantize_bundle(source.path, folder / "int8", recipe("int8"))[0]
    return versions, DamageMeter(versions, features).measure()


@pytest.mark.parametrize("names", [["int8", "int4-experts"], ["int8", "int4"]])
def test_switches_choose_between_versions(small_bundle, version, features, names):
    """With all layers at a level, the graph equals that version. Functions and weights may have the same names."""
    versions = [small_bundle, *map(version, names)]
    graph = SwitchedGraph(*(read_single(item.path / "encoder.onnx") for item in versions))
    assert len(graph.bytes["encoder.encoders.0.feed_forward"]) == len(versions)
    assert len(graph.bytes["encoder.encoders.0.self_attn"]) == 2 + ("int4" in names)
    for level, expected in enumerate(versions):
        session = SwitchedSession(graph, dict.fromkeys(graph.bytes, level))
        found = Encoder(session, small_bundle.manifest.model).whole(features[0])
        np.testing.assert_allclose(found, expected.load().encode(features[0]), rtol=0, atol=2e-5)
    (feeds,), layer = session.feeds, list(graph.bytes)[len(graph.bytes) // 2]
    expected, values = graph.run(feeds, {layer: 1}), feeds
    for number, part in enumerate(graph.parts):  # starting at a layer gives the same result
        if part.layer == layer:
            known = [(feeds, part.after(values, part.run(values, 1)))]
            found = SwitchedSession(graph, {layer: 1}, number + 1, known).run(feeds)
            np.testing.assert_array_equal(found["output"], expected["output"])
            other = {**feeds, "chunk": feeds["chunk"] + 1}  # known values are not used for other feeds
            of_others = SwitchedSession(graph, {}, number + 1, known).run(other)
            assert not np.array_equal(of_others["output"], found["output"])
        values = part.after(values, part.run(values, 0))
    assert sum(array.nbytes for array in values.values()) < 0.1 * sum(sizes[0] for sizes in graph.bytes.values())


def test_the_layer_that_hurts_is_found_also_in_pieces(hurt, features, monkeypatch):
    """Values, hypotheses and recordings may be processed in pieces with the same damage. Without changes, it is 0."""
    versions, whole = hurt
    for part, expected in (
        ("encoder", HURT), ("ctc", "ctc.ctc_lo"), ("decoder", "decoder.left_decoder.decoders.0.src_attn"),
    ):  # fmt: skip
        own = [item for item in whole.layers if item.layer.startswith(part)]
        assert max(own, key=lambda item: item.alone[-1]).layer == expected
    layers = {item.layer: item for item in whole.layers}
    worst = layers[HURT]
    assert worst.outliers[HURT_VALUE] == [5]
    assert worst.bytes[0] > 3 * worst.bytes[1]
    assert whole.divergence > 0.5 * worst.alone[-1]
    assert worst.group == "pointwise_convolutions"
    assert layers.keys() >= {"encoder.embed", "encoder.encoders.0.feed_forward"}
    for module, name in ((damage, "PIECE"), (damage, "MOST_BYTES"), (comparison, "MOST_SCORES")):
        monkeypatch.setattr(module, name, 100 if name == "PIECE" else 1)
    meter = DamageMeter(versions, features)
    assert meter.divergence({}) == 0
    for own, other in zip(meter.layers(), whole.layers, strict=True):
        assert own.alone == pytest.approx(other.alone, rel=1e-3, abs=1e-6)
        # hypotheses scored together share their common prefix
        assert own.errors == pytest.approx(other.errors, rel=0.1)
        assert own.outliers == other.outliers
    runs = [feeds["hyps"] for own in meter._references for feeds in own.feeds["decoder"]]
    assert len(runs) > len(features)
    assert {hyps.shape[1] for hyps in runs} == {1}


def test_recordings_calibrate_choose_or_judge(small_bundle, monkeypatch):
    """Each recording has one purpose unless there are few. Long recordings are cut into pieces that count as
    recordings."""

    def seconds(lengths, goal):
        heard = [np.full((length, 1), length, np.float32) for length in lengths]
        monkeypatch.setattr("u2moe.quantize.recordings.features_of", lambda *_, limit: heard)
        audio = read_audio(small_bundle, recipe("int8", calibration=["x"]), goal)
        parts = audio.chooses, audio.judges, audio.calibrates
        assert max(len(piece) for part in parts for piece in part) <= 2000
        own = {id(piece) for part in parts for piece in part}
        return [round(sum(map(len, part)) / 100) for part in parts], len(own) == sum(map(len, parts))

    long, limited = [6000, 9000, 30_000, 12_000], Goal(max_bytes=1)
    assert seconds(long, limited) == ([132, 238, 200], True)
    assert seconds(long, Goal()) == ([132, 132, 438], False)
    assert seconds([16_000], limited) == ([40, 60, 60], True)
    assert seconds([16_000], Goal()) == ([120, 120, 160], False)


def test_a_calibrated_bundle_reports_its_damage(hurt, recordings, tmp_path, capsys):
    """Smoothing has removed the outlier; the table is in the report and on the screen."""
    (source, _), before = hurt
    arguments = ["quantize", str(source.path), str(tmp_path / "out"), "--calibrate", str(recordings[0].parent)]
    assert main([*arguments, "--list", str(recordings[0].parent)]) == 0
    printed = capsys.readouterr().out
    damage = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["damage"]
    assert all(line in printed for line in describe_damage(damage))
    (item,) = (item for item in damage["layers"] if item["layer"] == HURT)
    assert HURT_VALUE not in item["outliers"]
    assert damage["divergence"] < 0.5 * before.divergence
    picture = ET.fromstring((tmp_path / "out" / "damage.svg").read_text(encoding="utf-8"))
    shown = {text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert {item["layer"] for item in damage["layers"]} <= shown
    assert Bundle.open(tmp_path / "out").manifest.quantization["calibration"]["seconds"] == pytest.approx(3, abs=0.2)


def test_layers_beyond_smoothing_stay_in_16_bits(small_bundle, many, features, tmp_path):
    """An outlier is in the encoder output, which also other nodes read, so int8 ruins the CTC head."""

    def add_outlier(model):
        factors = {"encoder.after_norm.weight": 512, "encoder.after_norm.bias": 512, "ctc.ctc_lo.weight": 1 / 512}
        for name, factor in factors.items():
            if (value := model.graph.initializers.get(name)) is not None:
                array = value.const_value.numpy().copy()
                array[5] *= factor
                value.const_value = ir.tensor(array, name=name)
        if model.graph.name == "ctc":
            model.graph.append(ir.node("Abs", [model.graph.inputs[0]]))

    source = rewritten_bundle(small_bundle, tmp_path / "float32", lambda models: [*map(add_outlier, models)])
    calibrated, goal = recipe("int8", calibration=many), Goal(max_damage=0.15)
    made, report = quantize_bundle(source.path, tmp_path / "out", calibrated, audio=many[:1], goal=goal)
    texts = [
        [ctc_greedy_search(model.ctc(model.encode(frames))).tokens for frames in features]
        for model in (source.load(), made.load())
    ]
    assert sum(map(edit_distance, *texts)) <= 0.15 * sum(map(len, texts[0]))
    exceptions = made.manifest.quantization["exceptions"]
    assert exceptions["ctc.ctc_lo"] == "fp16"
    kept = {value.const_value.dtype for value in ir.load(made.path / "ctc.onnx").graph.initializers.values()}
    assert ir.DataType.FLOAT16 in kept
    assert ir.DataType.INT8 not in kept
    assert report["damage"]["changed_tokens_at_most"] <= 0.15
    assert report["damage"]["written"]["recordings"] == 5
    assert {step["layer"]: step["format"] for step in report["damage"]["steps"]} == exceptions
    front = report["damage"]["front"]
    assert [point["bytes"] for point in front] == sorted(point["bytes"] for point in front)
    written = [point for point in front if point["written"]]
    assert written[-1]["at_most"] == report["damage"]["changed_tokens_at_most"]
    reported = ("report.json", "damage.svg", "front.svg")
    own_files = sum(file.stat().st_size for file in made.path.iterdir() if file.name not in reported)
    assert written[-1]["bytes"] == pytest.approx(own_files, rel=0.01)
    assert front[0]["at_most"] > 0.3
    assert front[0]["divergence"] == max(point["divergence"] for point in front)
    sizes = {f"{point['bytes'] / 1e6:.2f} MB" for point in front}
    assert all(f"{size} " in describe_report(report) for size in sizes)
    drawn = {item.text for item in ET.fromstring((made.path / "front.svg").read_text(encoding="utf-8")).iter()}
    assert drawn >= {"written and compared", "estimated from the divergence", "limit", "15.00%", *sizes}
    shown = describe(inspect_bundle(made.path))
    assert f"  fp16: {', '.join(exceptions)}" in shown
    assert "  max damage: 15 %\n" in shown


def test_a_limit_on_size_gives_layers_that_hurt_more_bytes(export_quickly, recordings, tmp_path, monkeypatch):
    """Starting with 4 bits, in wider blocks if the bundle is too large."""
    sizes = {"output_size": 64, "linear_units": 128, "num_blocks": 1}
    write_random_checkpoint(tmp_path / "checkpoint", random_config(encoder_conf=sizes, decoder=None))
    source = export_quickly(tmp_path / "checkpoint", tmp_path / "source")
    plain, _ = quantize_bundle(source, tmp_path / "plain", recipe("int4"))
    size = sum(file.stat().st_size for file in plain.path.iterdir())
    monkeypatch.setattr("u2moe.quantize.run.BLOCK_SIZES", (32,))
    larger, goal = replace(recipe("int4", calibration=recordings[:1]), block_size=16), Goal(max_bytes=size + 4_400)
    made, _ = quantize_bundle(source, tmp_path / "out", larger, goal=goal)
    assert made.manifest.quantization["block_size"] == 32
    assert size < sum(file.stat().st_size for file in made.path.iterdir()) <= goal.max_bytes
    assert made.manifest.quantization["exceptions"] == {"ctc.ctc_lo": "fp16"}


def test_a_limit_on_time_gives_the_layers_that_hurt_more(small_bundle, recordings, tmp_path, monkeypatch, capsys):
    """Here a network with int8 experts takes half of the time."""
    shares, measure = {}, DamageMeter.share

    def time_of(item, features):
        kinds = item.manifest.quantization
        return 0.1 + 0.1 * (sum(shares[layer] for layer in kinds.get("exceptions", {})) if kinds else 1)

    def share(meter, layer):
        return shares.setdefault(layer, measure(meter, layer))

    monkeypatch.setattr("u2moe.quantize.search.real_time_factor", time_of)
    monkeypatch.setattr(DamageMeter, "share", share)
    arguments = ["quantize", str(small_bundle.path), str(tmp_path / "out"), "--recipe", "int8-experts", "--no-report"]
    arguments += ["--calibrate", str(recordings[0]), "--overwrite", "--target-rtf"]
    assert main([*arguments, "0.16"]) == 0
    made = Bundle.open(tmp_path / "out")
    assert 0.16 - max(shares.values()) / 10 < time_of(made, []) <= 0.16
    assert set(made.manifest.quantization["exceptions"].values()) == {"fp16"}
    assert main([*arguments, "0.05", "--max-size", "9"]) == 1
    shown = capsys.readouterr().err
    assert "(at most 9 MB, real-time factor at most 0.05); the nearest has " in shown
    assert "MB, a real-time factor of 0.100 and changes " in shown


def test_measurements_are_kept_for_the_next_run(small_bundle, version, many, features, tmp_path, monkeypatch):
    """They are kept until the bundle is written; measurements of other recordings are not used."""
    out, journal = tmp_path / "out", tmp_path / "out.damage.jsonl"
    calibrated, goal = recipe("int8-experts", calibration=many[:8]), Goal(max_damage=0.9, resume=True)
    measure, asked = DamageMeter._nats, []

    def counted(meter, *others):
        asked.append(others)
        return measure(meter, *others)

    monkeypatch.setattr(DamageMeter, "_nats", counted)
    with monkeypatch.context() as patch:
        patch.setattr(QuantizationRun, "compare", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize_bundle(small_bundle.path, out, calibrated, goal=goal)
    assert [file.name for file in tmp_path.iterdir()] == [journal.name]
    measured = len(asked)
    with journal.open("a", encoding="utf-8") as file:
        file.write('["cut o')
    quantize_bundle(small_bundle.path, out, calibrated, goal=goal)
    assert len(asked) == measured
    assert not journal.exists()
    for own, num in ((features[:1], 1), (features[:1], 1), (features[1:2], 2)):
        meter = DamageMeter([small_bundle, version("int8")], own, journal)
        meter.divergence(meter.most)
        assert len(asked) == measured + num


def test_layers_get_better_formats_until_words_are_right(small_bundle, recordings, tmp_path, monkeypatch):
    """The number of steps doubles each time, until no steps are left."""
    rises = iter(["rose", "rose", "rose", ""])
    monkeypatch.setattr(quantizer, "build_report", lambda *_, **__: {"changes": {}})
    monkeypatch.setattr(quantizer, "_risen", lambda *_: next(rises))
    calibrated, goal = recipe("int4-experts", calibration=recordings[:1]), Goal(max_wer_increase=0.01)
    said = [Recording(path=recordings[0], transcript="words")]
    made, report = quantize_bundle(small_bundle.path, tmp_path / "out", calibrated, recordings=said, goal=goal)
    assert set(made.manifest.quantization["exceptions"].values()) == {"int8", "fp16"}
    assert len(made.manifest.quantization["exceptions"]) == len(report["damage"]["steps"]) == 4
    monkeypatch.setattr(quantizer, "_risen", lambda *_: "rose")
    with pytest.raises(QuantizationError, match="rose"):
        quantize_bundle(small_bundle.path, tmp_path / "none", calibrated, recordings=said, goal=goal)
    assert not (tmp_path / "none").exists()


def test_folders_of_killed_processes_are_removed(tmp_path):
    """Folders of running processes stay, as do new folders that are not locked yet."""
    killed, new, ancient = (tmp_path / f"{TEMPORARY}{name}" for name in ("killed", "new", "ancient"))
    for folder in (killed, new, ancient):
        folder.mkdir()
    (killed / "lock").touch()
    os.utime(ancient, (0, 0))
    with temporary_folder(tmp_path) as living, temporary_folder(tmp_path) as other:
        assert sorted(tmp_path.iterdir()) == sorted([living, other, new])
    assert list(tmp_path.iterdir()) == [new]


def test_goals_that_cannot_be_met_are_refused_before_anything_is_measured(small_bundle, many, tmp_path, monkeypatch):
    """Sizes below the smallest formats, recordings that cannot show so few changes, nothing to resume or measure."""
    calibrated, few, out = recipe("int8", calibration=many), recipe("int8", calibration=many[:1]), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("u2moe.quantize.run.recorded", Mock(side_effect=AssertionError("measured")))
        for own, goal, error, message in (
            (calibrated, Goal(max_bytes=1e5), QuantizationError,
             r"0.1 MB\): even the smallest formats \(recipe int8\) need 0\.\d\d MB"),
            (calibrated, Goal(max_damage=0.005), AudioError,
             r"24 s of recordings cannot show that at most 0.50% .* needs at least 734; use about"),
            (few, Goal(max_damage=1e-4), AudioError, "judging bundles has 0 tokens, but needs at least 36681"),
            (recipe("int8"), Goal(resume=True), ValueError, "resume needs at least one limit, such as max_damage, and"),
            (calibrated, Goal(resume=True), ValueError, "resume needs at least one limit, such as max_damage, and"),
            (recipe("int8"), Goal(max_bytes=1e9), ValueError, "require recordings for calibration"),
        ):  # fmt: skip
            with pytest.raises(error, match=message):
                quantize_bundle(small_bundle.path, out, own, goal=goal)

    def overflow(model):
        if value := model.graph.initializers.get("encoder.encoders.1.norm_ff.weight"):
            value.const_value = ir.tensor(np.full(value.shape.numpy(), 3e38, np.float32), name=value.name)

    broken = rewritten_bundle(small_bundle, tmp_path / "broken", lambda models: [*map(overflow, models)])
    with pytest.raises(QuantizationError, match=r"encoders.1.feed_forward receives NaN or infinity"):
        quantize_bundle(broken.path, out, few)
    assert list(tmp_path.iterdir()) == [tmp_path / "broken"]


def test_a_limit_holds_if_the_end_of_its_interval_does(small_bundle, many, tmp_path, monkeypatch):
    """The limit is in nats. The error states how many recordings would be enough; each attempt uses half of the
    doubt."""
    doubts, holds = [], FormatSearch._holds

    def noted(search, found, doubt, times=1.0):
        doubts.append(doubt)
        return holds(search, found, doubt, times)

    monkeypatch.setattr(FormatSearch, "_holds", noted)
    calibrated, goal = recipe("int8-experts", calibration=many), Goal(max_divergence=3e-5)
    made, report = quantize_bundle(small_bundle.path, tmp_path / "out", calibrated, audio=many[:1], goal=goal)
    written = report["damage"]["written"]
    assert 0 < written["divergence"]["value"] < written["divergence"]["high"] <= 3e-5
    assert made.manifest.quantization["goal"]["max_divergence"] == 3e-5
    assert {0.05 / 2**index for index in range(len(set(doubts)))} == set(doubts)
    search = FormatSearch.__new__(FormatSearch)
    search._goal = Goal(max_damage=0.005)
    tokens, frames, edits = np.full((10, 1), 50.0), np.full(10, 100), np.eye(10, 1)
    few = Difference(edits=edits, tokens=tokens, divergences=0.1 * edits[:, 0], frames=frames, seconds=100.0)
    assert not search._holds(few, 0.05)
    needed = r"bundles were judged on 100 s of recordings; about \d\d\d s would be enough"
    assert re.search(needed, search._audio_needed(few, 0.05))
    assert search._audio_needed(replace(few, edits=np.ones((10, 1))), 0.05) == "more recordings would not change that"


def test_a_budget_buys_the_best_steps_in_the_order_of_their_gain_for_each_byte():
    """A second step never comes without the first; steps that save time come first. Also the fewest that are enough."""
    alone = {"a": [0, 1.0, 5.0], "b": [0, 0.5, 0.5], "c": [0, 0.0, 9.0]}
    layers = [
        LayerDamage(layer=layer, bytes=[800, 200, 100], alone=own, errors=own, group="", outliers={})
        for layer, own in alone.items()
    ]
    ladder = Ladder(Damage(frames=1, divergence=0.0, layers=layers))
    assert [(step.layer, step.level) for step in ladder.steps] == [("c", 1), ("a", 1), ("a", 0), ("b", 0), ("c", 0)]
    assert ladder.levels([]) == {"a": 2, "b": 2, "c": 2}
    assert ladder.levels(ladder.steps) == {"a": 0, "b": 0, "c": 0}
    found = ladder.most(lambda step: [step.bytes], [250])
    assert [(step.layer, step.level) for step in found] == [("c", 1), ("a", 1)]
    assert ladder.most(lambda step: [step.bytes], [-1]) is None
    found = ladder.most(lambda step: [step.bytes, -1 if step.layer == "b" else 1], [5000, -1])
    assert [step.layer for step in found] == ["b"]
    for most, bought in (({}, ""), ({"c": 1}, "c1"), ({"a": 1}, "a1 c1"), ({"a": 0}, "a0 c1"), ({"b": 0}, "a0 b0 c1")):
        found = ladder.fewest(lambda levels, most=most: all(levels[layer] <= level for layer, level in most.items()))
        chosen = sorted(f"{layer}{level}" for layer, level in ladder.levels(found).items() if level < 2)
        assert " ".join(chosen) == bought
    assert ladder.fewest(lambda _: False) == ladder.steps
