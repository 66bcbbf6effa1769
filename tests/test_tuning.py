"""The choice of kernels for experts: QMoE's numbers, what is measured and chosen, and what the bundle keeps of it."""

import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import soundfile
from manifests import edit_manifest

from u2moe.quantize import FORMATS, Recipe, Tune, quantize_bundle, recipe
from u2moe.quantize.arithmetic import relative_error
from u2moe.quantize.cli import _shares
from u2moe.quantize.config import USES
from u2moe.quantize.experts import qmoe
from u2moe.quantize.experts.layer import expert_layers
from u2moe.quantize.routing import ExpertInputs
from u2moe.quantize.tuning import choice
from u2moe.quantize.tuning.measurement import Spread
from u2moe.quantize.tuning.record import TunedExperts, Tuning, describe
from u2moe.runtime import Bundle, BundleError, DecodingOptions, Recognizer
from u2moe.runtime.bundle.manifest import FileDigest
from u2moe.runtime.cli import _parser, main

pytestmark = pytest.mark.slow

FEW = {"shares": {4: 1.0, 16: 1.0}, "repetitions": 1}


@pytest.fixture(scope="module")
def float32(exported):
    return Bundle.open(exported("moe_tiny"))


@pytest.fixture(scope="module")
def encoder(float32):
    """The float32 encoder; tuning leaves it as it is."""
    return ir.load(float32.path / "encoder.onnx")


def timer_of(milliseconds):
    """A timer that calls nothing and gives what it is told by format, and for some formats by tokens."""

    def timer(kind, tokens, _):
        value = milliseconds[kind]
        return (value[tokens] if isinstance(value, dict) else value) / 1e3

    return timer


# --- QMoE


def test_block_sizes_divide_both_layer_sizes(encoder):
    """moe_tiny has 64 and 96: the largest power of two in both is 32."""
    layers = expert_layers(encoder)
    assert len(layers) == 6
    sizes = {layer.sizes for layer in layers}
    assert len(sizes) == 1
    for size in next(iter(sizes)):
        assert size % qmoe.block_size(layers[0]) == 0
    with pytest.raises(BundleError, match="activation is tanh, expected one of swish, relu, gelu"):
        qmoe.check_layer(
            dataclasses.replace(layers[0], mixture=dataclasses.replace(layers[0].mixture, activation="tanh"))
        )


@pytest.mark.parametrize(("kind", "limit"), [("int8-qmoe", 0.06), ("int4-qmoe", 0.2)])
def test_a_kernel_can_be_asked_for_without_measuring(kind, limit, float32, tmp_path, sound):
    """The limits are those of our dispatch in as many bits, see test_quantize."""
    clip = tmp_path / "noise.wav"
    soundfile.write(clip, sound, 16000)
    bundle, report = quantize_bundle(float32.path, tmp_path / "out", recipe("int8", {"experts": kind}), audio=[clip])
    assert bundle.manifest.quantization["recipe"] == f"int8[experts={kind}]"
    assert bundle.manifest.tuning is None
    assert report["outputs"]["encoder_relative"] < limit
    assert 0 < report["weight_error"]["experts"]["relative"] < {"int8-qmoe": 0.01, "int4-qmoe": 0.12}[kind]
    assert len(report["routing_agreement"]) == 6
    before = report["bytes"]["groups"]["experts"]
    assert 0.1 < before["after"] / before["before"] < 0.35


# --- the choice


@pytest.mark.parametrize(
    ("milliseconds", "shares", "chosen"),
    [
        ({"int8": 2.0, "int8-qmoe": 1.0}, {4: 1.0}, "int8-qmoe"),
        ({"int8": 1.0, "int8-qmoe": 2.0}, {4: 1.0}, "int8"),
        ({"int8": 1.0, "int8-qmoe": 0.99}, {4: 1.0}, "int8"),  # as much as noise gives
        ({"int8": {4: 2, 16: 2}, "int8-qmoe": {4: 1, 16: 7}}, {4: 1.0, 16: 0.0}, "int8-qmoe"),
        ({"int8": {4: 2, 16: 2}, "int8-qmoe": {4: 1, 16: 7}}, {4: 0.0, 16: 1.0}, "int8"),
        # for each token 1/4 less and 5/16 more
        ({"int8": {4: 2, 16: 2}, "int8-qmoe": {4: 1, 16: 7}}, {4: 1.0, 16: 1.0}, "int8"),
        ({"int8": {4: 2, 16: 2}, "int8-qmoe": {4: 1, 16: 7}}, {4: 3.0, 16: 1.0}, "int8-qmoe"),
    ],
)
def test_the_choice_follows_the_times_and_what_counts(encoder, milliseconds, shares, chosen):
    tune = Tune(shares=shares, repetitions=2)
    found = choice.tune_experts(encoder, recipe("int8"), tune, timer=timer_of(milliseconds))
    assert found.chosen == chosen
    assert set(found.times_ms) == {"int8", "int8-qmoe"}
    assert found.num_layers == 6
    for kind, times in found.times_ms.items():
        value = milliseconds[kind]
        for tokens, spread in times.items():
            told = value[int(tokens)] if isinstance(value, dict) else value
            assert spread.median == pytest.approx(told / 6 / 8)  # six layers, each on eight pieces of what it hears
            assert spread.count == 2
    assert sum(found.shares.values()) == pytest.approx(1)
    assert 0 < max(found.errors.values()) < 0.03


def test_fewer_bits_are_neither_measured_nor_chosen_unless_allowed(encoder):
    milliseconds = {"int8": 9.0, "int8-qmoe": 8.0, "int4": 1.0, "int4-qmoe": 2.0}
    for lossy, chosen in ((False, "int8-qmoe"), (True, "int4")):
        tune = Tune(lossy=lossy, **FEW)
        found = choice.tune_experts(encoder, recipe("int8"), tune, timer=timer_of(milliseconds))
        assert found.chosen == chosen
        assert ("int4" in found.times_ms) == ("int4-qmoe" in found.times_ms) == lossy
    for fewer, chosen in ((7.5, "int8-qmoe"), (7.1, "int4")):  # words are not lost for little
        told = timer_of({**milliseconds, "int4": fewer, "int4-qmoe": fewer})
        assert choice.tune_experts(encoder, recipe("int8"), tune, timer=told).chosen == chosen
    found = choice.tune_experts(encoder, recipe("int4-experts"), tune, timer=timer_of(milliseconds))
    assert (set(found.times_ms), found.chosen) == ({"int4", "int4-qmoe"}, "int4")


def test_every_format_is_timed_on_its_own_kernel(encoder):
    """The timer gets calls that compute: all layers of that format, on so many tokens."""
    seen = {}

    def timer(kind, tokens, call):
        seen[kind, tokens] = call()
        return 1e-3

    choice.tune_experts(encoder, recipe("int8"), Tune(lossy=True, **FEW), timer=timer)
    assert set(seen) == {(kind, count) for kind in FORMATS["experts"][1:] for count in (4, 16)}
    for (kind, count), outputs in seen.items():
        assert [[array.shape for array in call] for call in outputs] == [[(1, count, 64)] * 6] * 8
        for found, reference in zip(outputs, seen["int8", count], strict=True):
            assert max(map(relative_error, reference, found)) < (0.03 if kind.startswith("int8") else 0.2)
    assert relative_error(seen["int8", 4][0][0], seen["int8-qmoe", 4][0][0]) > 0


def refused(encoder, rule):
    found = choice.tune_experts(encoder, rule, Tune(**FEW), timer=timer_of({"int8": 9.0}))
    assert found.chosen == "int8"
    assert set(found.times_ms) == set(found.errors) == {"int8"}
    return found.refused["int8-qmoe"]


def test_kernels_that_cannot_are_left_out_with_their_reason(encoder, monkeypatch):
    with monkeypatch.context() as patch:  # as in an onnxruntime that does not have it
        patch.setattr(qmoe, "CONTRIB", "com.nobody")
        reason = refused(encoder, recipe("int8"))
        assert reason.startswith(f"onnxruntime {onnxruntime.__version__}: [ONNXRuntimeError]")
        assert len(reason) < 240
    with monkeypatch.context() as patch:  # wrong numbers
        exact = qmoe.int8_blocks
        patch.setattr(qmoe, "int8_blocks", lambda weight, block: exact(weight[::-1], block))
        assert re.search(
            r"error of a layer is \d\d+\.\d+%, expected at most [12]\.\d\d%", refused(encoder, recipe("int8"))
        )


def test_the_recipes_own_kernel_must_run(encoder, monkeypatch):
    monkeypatch.setattr(choice._Layers, "error", lambda *_: float("nan"))
    with pytest.raises(BundleError, match="experts in int8: error of a layer is nan%, expected at most 100"):
        choice.tune_experts(encoder, recipe("int8"), Tune(**FEW), timer=timer_of({}))


def test_weights_may_lie_beside_the_graph(encoder, float32, tmp_path):
    model = ir.load(float32.path / "encoder.onnx")
    ir.save(model, tmp_path / "encoder.onnx", external_data="encoder.onnx.data")
    beside = ir.load(tmp_path / "encoder.onnx")
    told = timer_of({"int8": 2.0, "int8-qmoe": 1.0})
    expected, found = (choice.tune_experts(each, recipe("int8"), Tune(**FEW), timer=told) for each in (encoder, beside))
    assert expected == found
    assert found.chosen == "int8-qmoe"


def test_inputs_of_experts_are_found_where_weights_lie_beside_the_graph(float32, tmp_path, monkeypatch):
    """And other processes can read those meanwhile."""
    frames = np.random.default_rng(5).normal(8, 2, (100, 80)).astype(np.float32)
    expected = ExpertInputs(float32).tokens(frames)
    ir.save(ir.load(float32.path / "encoder.onnx"), tmp_path / "encoder.onnx", external_data="encoder.onnx.data")
    create = onnxruntime.InferenceSession

    def read_meanwhile(*arguments, **settings):
        weights = ir.load(tmp_path / "encoder.onnx").graph.initializers.values()
        assert sum(weight.const_value.numpy().nbytes for weight in weights) > 1_000_000
        return create(*arguments, **settings)

    monkeypatch.setattr(onnxruntime, "InferenceSession", read_meanwhile)
    found = ExpertInputs(Bundle(tmp_path, float32.manifest, float32.tokens)).tokens(frames)
    assert list(found) == list(expected)
    assert len(found) == 6
    for layer, tokens in expected.items():
        np.testing.assert_array_equal(found[layer], tokens)
        assert tokens.shape[1] == 64
        assert len(np.unique(tokens, axis=0)) == len(tokens) > 10


def test_layers_alone_are_those_of_the_graph(encoder, float32):
    """What is timed is what the encoder computes, layer by layer."""
    model = ir.load(float32.path / "encoder.onnx")
    alone = choice.layers_alone(model, [0, 3])
    assert [value.name for value in alone.graph.inputs] == ["x0", "x1"]
    assert [value.name for value in alone.graph.outputs] == ["y0", "y1"]
    names = [layer.node.name for layer in expert_layers(alone)]
    assert names == [layer.node.name for layer in expert_layers(encoder)[:4:3]]
    assert len(list(model.graph)) == len(list(encoder.graph))


# --- bundles


@pytest.fixture
def told(monkeypatch):
    """A function that says how long kernels take from now on, in whole bundles."""

    def tell(milliseconds):
        monkeypatch.setattr(choice, "timed", timer_of(milliseconds))

    return tell


def text_of(bundle, sound, chunk_size):
    recognizer = Recognizer(bundle, bundle.load())
    return recognizer.transcribe(sound, options=DecodingOptions(chunk_size=chunk_size)).text


def operators(bundle, graph):
    return {node.op_type for function in ir.load(bundle.path / f"{graph}.onnx").functions.values() for node in function}


@pytest.mark.parametrize(("fast", "slow"), [("int8", "int8-qmoe"), ("int8-qmoe", "int8")])
def test_a_tuned_bundle_is_what_its_recipe_and_kernel_say(float32, tmp_path, told, sound, fast, slow):
    """To the byte, and so in every text; our dispatch is what the recipe says without tuning."""
    told({fast: 1.0, slow: 2.0})
    tuned, _ = quantize_bundle(float32.path, tmp_path / "tuned", recipe("int8", tune=Tune(**FEW)))
    asked = recipe("int8") if fast == "int8" else recipe("int8", {"experts": fast})
    plain, _ = quantize_bundle(float32.path, tmp_path / "plain", asked)
    assert tuned.manifest.files == plain.manifest.files
    for chunk_size in (None, 16):
        text = text_of(tuned, sound, chunk_size)
        assert text == text_of(plain, sound, chunk_size) != ""
    for graph in ("encoder", "decoder"):
        assert ("QMoE" in operators(tuned, graph)) == (fast == "int8-qmoe")
        assert tuned.manifest.tuning["graphs"][graph]["chosen"] == fast
    assert tuned.manifest.quantization["experts_of"] == {"encoder": fast, "decoder": fast}
    assert tuned.manifest.quantization["recipe"] == "int8"
    assert plain.manifest.tuning is None
    assert "experts_of" not in plain.manifest.quantization


def test_a_frame_hardly_depends_on_its_chunk_with_qmoe(float32, tmp_path):
    """It adds floats in an order that depends on how many tokens there are: not equal to the bit, as our dispatch is.

    What rounds the other way then is one step of 127 of some token.
    """
    bundle, _ = quantize_bundle(float32.path, tmp_path / "out", recipe("int8", {"experts": "int8-qmoe"}))
    model = bundle.load()
    features = np.random.default_rng(3).normal(8, 2, (131, 80)).astype(np.float32)
    alone = model.encode(features, 16, 4)
    assert relative_error(alone[:16], model.encode(features[:67], 16, 4)) < 1e-3
    pair, _ = model.encoder.step(np.stack([features[:67]] * 3), model.encoder.start(3), required_cache_size=64)
    assert relative_error(alone[:16], pair[1]) < 1e-3


def test_layers_are_timed_on_what_they_read_in_the_encoder(float32, encoder, monkeypatch):
    """Each its own tokens, in pieces from the first to the last."""
    features = np.random.default_rng(5).normal(8, 2, (3, 200, 80)).astype(np.float32)
    tune = Tune(shares={8: 1.0, 96: 1.0}, repetitions=1)
    seen = {}

    def spy(model, rule, tune, speech, **options):
        seen[options["title"]] = speech
        return tuning_experts(model, rule, tune, speech, **options)

    tuning_experts = choice.tune_experts
    monkeypatch.setattr(choice, "tune_experts", spy)
    monkeypatch.setattr(choice, "timed", timer_of({"int8": 1.0, "int8-qmoe": 2.0}))
    _, found = choice.tuned(float32, recipe("int8", tune=tune), list(features))
    assert {name: experts.tokens for name, experts in found.graphs.items()} == {
        "encoder": "speech",
        "decoder": "random",
    }
    speech = seen["experts of encoder"]
    assert seen["experts of decoder"] == {}
    per_utterance = len(float32.load().encode(features[0]))
    lengths = {len(tokens) for tokens in speech.values()}
    assert lengths == {-(-96 // per_utterance) * per_utterance}  # no more than it takes
    layers = choice._Layers(encoder, recipe("int8"), 1, speech)
    assert [choice.scope(expert_layers(encoder)[index].node) for index in layers.indices] == list(speech)
    (first, *_, last) = layers.windows(8)
    for number, tokens in enumerate(speech.values()):
        np.testing.assert_array_equal(first[f"x{number}"], tokens[np.newaxis, :8])
        np.testing.assert_array_equal(last[f"x{number}"], tokens[np.newaxis, -8:])
    (repeated,) = layers.windows(500)
    np.testing.assert_array_equal(repeated["x0"][0, lengths.pop() :][:8], first["x0"][0])


def test_the_decoder_counts_at_the_largest_number_of_tokens(float32, told):
    told({"int8": {4: 2, 16: 2}, "int8-qmoe": {4: 1, 16: 7}})
    rule, found = choice.tuned(float32, recipe("int8", tune=Tune(shares={16: 0.0, 4: 1.0}, repetitions=1)))
    assert rule.experts_of == {"encoder": "int8-qmoe", "decoder": "int8"}
    assert found.graphs["decoder"].shares == {"16": 1.0, "4": 0.0}
    assert rule.of_graph("encoder").quantized["experts"] == "int8-qmoe"
    assert rule.of_graph("decoder").quantized["experts"] == "int8"
    assert rule.of_graph("ctc").quantized["experts"] == "int8"


def test_the_command_records_and_inspect_tells(float32, tmp_path, told, capsys, monkeypatch):
    told({"int8": 3.0, "int8-qmoe": 2.0})
    out = tmp_path / "out"
    options = ["--tune", "--tune-tokens", "4=3", "16", "--tune-threads", "2", "--no-report", "--quiet"]
    assert main(["quantize", str(float32.path), str(out), *options]) == 0
    printed = capsys.readouterr().out
    record = Tuning.from_data(Bundle.open(out).manifest.tuning)
    assert describe(record) in printed
    assert record.num_threads == 2
    assert record.onnxruntime == onnxruntime.__version__
    assert record.graphs["encoder"].shares == {"4": 0.75, "16": 0.25}
    assert record.differences() == []
    # 2 ms for six layers and eight pieces; for each token 3/4 of a fourth and 1/4 of a sixteenth of that
    row = next(line for line in printed.splitlines() if line.startswith("> int8-qmoe"))
    assert row.split()[2:4] == ["0.042", "(0.042-0.042)"]
    assert f"{41.667 * (0.75 / 4 + 0.25 / 16):.2f}" in row
    assert "6 layers in turn on random tokens" in printed

    assert main(["inspect", str(out)]) == 0
    assert describe(record) in capsys.readouterr().out
    assert "(this machine)" in describe(record)
    monkeypatch.setattr("u2moe.quantize.tuning.record.processor", lambda _: "another processor")
    assert main(["inspect", str(out)]) == 0
    assert f"elsewhere: processor {record.processor}, here another processor" in capsys.readouterr().out
    assert main(["inspect", str(float32.path)]) == 0
    assert "tuned on" not in capsys.readouterr().out


@pytest.fixture
def record():
    """A tuning record as the manifest keeps it."""
    spread = Spread(median=2.0, low=1.0, high=3.0, count=3)
    times = {kind: {"4": spread, "16": spread} for kind in ("int8", "int8-qmoe")}
    experts = TunedExperts(
        chosen="int8", tokens="speech", num_layers=1, shares={"4": 0.5, "16": 0.5}, times_ms=times,
        errors=dict.fromkeys(times, 0.01), refused={},
    )  # fmt: skip
    tuning = Tuning.here({"encoder": experts}, 1)
    assert Tuning.from_data(json.loads(json.dumps(tuning.data()))) == tuning
    return json.loads(json.dumps(tuning.data()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("processor"), "missing 1 required keyword-only argument: 'processor'"),
        (lambda t: t.update(colour="red"), "unexpected keyword argument 'colour'"),
        (lambda t: t.update(num_threads=0), "num_threads must be at least 1, got 0"),
        (lambda t: t.update(graphs={}), "graphs must be at least one"),
        (lambda t: t.update(date="yesterday"), "date must be like 2026-01-31, got 'yesterday'"),
        (lambda t: t["graphs"]["encoder"].update(chosen="int3"), "chosen must be one of int8, int8-qmoe"),
        (lambda t: t["graphs"]["encoder"].update(tokens="music"), "tokens must be 'speech' or 'random', got 'music'"),
        (lambda t: t["graphs"]["encoder"].update(num_layers=0), "num_layers must be at least 1, got 0"),
        (lambda t: t["graphs"]["encoder"]["shares"].update({"4": 2.0}), "shares must be from 0 to 1"),
        (lambda t: t["graphs"]["encoder"]["shares"].update({"4": 0.1}), "shares must sum to 1, got 0.6"),
        (lambda t: t["graphs"]["encoder"]["times_ms"]["int8"].pop("4"), "times_ms of int8 must be of 4, 16 tokens"),
        (lambda t: t["graphs"]["encoder"]["times_ms"]["int8"]["4"].update(low=9.0), "int8, 4 tokens, must be times"),
        (
            lambda t: t["graphs"]["encoder"]["times_ms"]["int8"].update({"4": 1.0}),
            "argument after ** must be a mapping, not float",
        ),
        (
            lambda t: t["graphs"]["encoder"]["errors"].pop("int8"),
            "errors of int8 must be at least 0, got None",
        ),
    ],
)
def test_a_damaged_record_is_no_reason_to_refuse_a_bundle(float32, tmp_path, record, damage, message, capsys):
    """The runtime does not judge it; who reads it says what is wrong with it."""
    damage(record)
    with pytest.raises(ValueError, match=re.escape(message)):
        Tuning.from_data(record)
    out = shutil.copytree(float32.path, tmp_path / "out")
    edit_manifest(out, lambda content: content.update(tuning=record))
    Bundle.open(out).load()
    assert main(["inspect", str(out)]) == 0
    assert "tuned, but the record cannot be read: " in capsys.readouterr().out


def test_a_graph_of_another_onnxruntime_is_refused_with_the_reason(float32, tmp_path, told, monkeypatch):
    told({"int8": 2.0, "int8-qmoe": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr("u2moe.quantize.tuning.record.onnxruntime.__version__", "99.1")
        bundle, _ = quantize_bundle(float32.path, tmp_path / "out", recipe("int8", tune=Tune(**FEW)))
    graph = b"operators of tomorrow"
    (bundle.path / "encoder.onnx").write_bytes(graph)
    bundle.manifest.files["encoder.onnx"] = FileDigest(sha256=hashlib.sha256(graph).hexdigest(), size=len(graph))
    with pytest.raises(BundleError, match=r"refuses it: .*; kernels were chosen with onnxruntime 99\.1, this is 1\."):
        bundle.load(kernels="onnxruntime")
    untuned = dataclasses.replace(bundle.manifest, tuning=None)
    with pytest.raises(BundleError) as caught:
        Bundle(bundle.path, untuned, bundle.tokens).load()
    assert "chosen" not in str(caught.value)


def test_machines_differ_by_what_decides_times():
    spread = Spread(median=2.0, low=1.0, high=3.0, count=3)
    experts = TunedExperts(
        chosen="int8", tokens="speech", num_layers=1, shares={"4": 1.0}, times_ms={"int8": {"4": spread}},
        errors={"int8": 0.01}, refused={"int8-qmoe": "not here"},
    )  # fmt: skip
    here = Tuning.here({"encoder": experts}, 1)
    assert here.differences() == []
    for name in ("processor", "instruction_sets", "onnxruntime"):
        (difference,) = dataclasses.replace(here, **{name: "x y"}).differences()
        assert difference.startswith(f"{name.replace('_', ' ')} x y, here ")
    assert dataclasses.replace(here, date="2020-01-01").differences() == []
    (difference,) = dataclasses.replace(here, kernels="u2moe-kernels 9 (x)").differences()
    assert difference == f"native kernels u2moe-kernels 9 (x), here {here.kernels}"
    assert dataclasses.replace(here, kernels=None).differences() == []  # of an older record
    lines = describe(here).splitlines()
    assert lines[-1] == "  int8-qmoe not chosen: not here"
    assert lines[-2].split() == [">", "int8", "2.000", "(1.000-3.000)", "500.00", "1.00%"]


# --- options


def test_options_are_checked_at_birth():
    for values in USES.values():
        assert sum(values.values()) == pytest.approx(1)
        assert set(values) == {4, 8, 16, 128, 250}
    with pytest.raises(ValueError, match="tokens per call must be at least 1, got 0"):
        Tune(shares={0: 1.0})
    with pytest.raises(ValueError, match="share of 4 tokens must be at least 0, got -1"):
        Tune(shares={4: -1.0})
    with pytest.raises(ValueError, match="at least one must be above 0"):
        Tune(shares={4: 0.0})
    with pytest.raises(ValueError, match="num_threads must be at least 1, got 0"):
        Tune(num_threads=0)
    with pytest.raises(ValueError, match="repetitions must be at least 1, got 0"):
        Tune(repetitions=0)
    for name, groups in (("fp16", {}), ("fp32", {"attention": "int8"}), ("int8", {"experts": "int8-qmoe"})):
        with pytest.raises(ValueError, match="tune chooses kernels for experts in int8 or int4, got experts in"):
            recipe(name, groups, tune=Tune())
    with pytest.raises(ValueError, match=r"experts_of must be of fp32, int8, .*, got 'int3'"):
        Recipe(name="x", groups={"experts": "int8"}, experts_of={"encoder": "int3"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tune-for", "full"], "--tune-for needs --tune"),
        (["--tune-lossy"], "--tune-lossy needs --tune"),
        (["--tune-threads", "2"], "--tune-threads needs --tune"),
        (["--tune", "--tune-for", "full", "--tune-tokens", "4"], "--tune-for and --tune-tokens exclude each other"),
        (["--tune", "--tune-tokens", "few"], "--tune-tokens must be COUNT or COUNT=SHARE, got 'few'"),
        (["--tune", "--tune-tokens", "4=much"], "--tune-tokens must be COUNT or COUNT=SHARE, got '4=much'"),
        (["--tune", "--tune-tokens", "4", "4=2"], "--tune-tokens must name each count once, got 4 twice"),
        (["--tune", "--tune-tokens", "0"], "tokens per call must be at least 1, got 0"),
        (["--tune", "--tune-threads", "0"], "num_threads must be at least 1, got 0"),
        (["--tune", "--recipe", "fp16"], "tune chooses kernels for experts in int8 or int4, got experts in fp32"),
    ],
)
def test_wrong_options_are_refused(float32, tmp_path, capsys, options, message):
    assert main(["quantize", str(float32.path), str(tmp_path / "out"), "--no-report", *options]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_guides_commands_are_those_of_the_parser():
    guide = (Path(__file__).parent.parent / "docs" / "tuning.md").read_text(encoding="utf-8")
    commands = [line.partition("#")[0].split()[1:] for line in guide.splitlines() if line.startswith("u2moe ")]
    parsed = [_parser(command[0]).parse_args(command) for command in commands]
    assert len(parsed) == 6
    assert [vars(args).get("tune") for args in parsed] == [True] * 4 + [False, None]
    assert _shares(parsed[2].tune_tokens) == {16: 3.0, 64: 1.0}


def test_without_experts_there_is_nothing_to_tune(exported, tmp_path):
    with pytest.raises(BundleError, match="tune chooses kernels for experts, but no graph has any"):
        quantize_bundle(exported("dense_tiny"), tmp_path / "out", recipe("int8", tune=Tune()))
    assert list(tmp_path.iterdir()) == []
