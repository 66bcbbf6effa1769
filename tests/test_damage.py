"""Damage by layer, the switches that measure it, and better formats for the layers that hurt."""

import json

import numpy as np
import onnx_ir as ir
import pytest
from changed_bundles import changed_bundle, write_noise

from u2moe.quantize import inspect_bundle, quantize_bundle, recipe, run
from u2moe.quantize.damage import Damage, DamageMeter, LayerDamage, describe_damage, layers_to_spare
from u2moe.quantize.inspection import describe
from u2moe.quantize.report import features_of
from u2moe.quantize.smoothing import scale, sites_of
from u2moe.quantize.switches import SwitchedGraph
from u2moe.runtime import AudioError, Bundle, QuantizationError, ctc_greedy_search
from u2moe.runtime.cli import main
from u2moe.runtime.model.encoder import Encoder
from u2moe.runtime.text.word_errors import edit_distance

pytestmark = pytest.mark.slow
HURT, HURT_VALUE = "encoder.encoders.1.conv_module", "encoder/encoders.1/norm_conv/AddNormalization:1"


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("recordings"), 3, 48_000)


@pytest.fixture(scope="module")
def features(bundle, recordings):
    return features_of(bundle, sorted(recordings.iterdir()))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Damage is measured with onnxruntime alone."""
    monkeypatch.setenv("U2MOE_KERNELS", "onnxruntime")


@pytest.fixture(scope="module")
def hurt(bundle, tmp_path_factory):
    """The tiny bundle with an outlier of 512 times the size before the convolution of block 1, and it in int8."""
    folder = tmp_path_factory.mktemp("hurt")

    def add_outlier(model):
        for site in sites_of(model):
            if site.name.startswith("encoder/encoders.1/norm_conv"):
                scale(site, np.where(np.arange(len(site.columns)) == 5, -9, 0))

    source = changed_bundle(bundle, folder / "float32", add_outlier)
    return source, quantize_bundle(source.path, folder / "int8", recipe("int8"))[0]


@pytest.fixture(scope="module")
def beyond_smoothing(bundle, tmp_path_factory):
    """An outlier in the encoder output, which no graph can scale by itself: in int8 the CTC head is of no use."""

    def add_outlier(model):
        factors = {"encoder.after_norm.weight": 512, "encoder.after_norm.bias": 512, "ctc.ctc_lo.weight": 1 / 512}
        for name, factor in factors.items():
            if (value := model.graph.initializers.get(name)) is not None:
                array = value.const_value.numpy().copy()
                array[5] *= factor
                value.const_value = ir.tensor(array, name=name)

    return changed_bundle(bundle, tmp_path_factory.mktemp("beyond") / "bundle", add_outlier)


class Switched:
    def __init__(self, graph, quantized):
        self.graph, self.quantized = graph, quantized

    def run(self, feeds):
        return self.graph.run(feeds, self.quantized)


@pytest.mark.parametrize(("name", "other"), [("int8", None), ("int4-experts", None), ("int4-experts", "int8")])
def test_switches_choose_between_two_bundles(bundle, quantized, features, name, other):
    """All on: the quantized bundle; all off: the other. Their functions and weights may have the same names."""
    second = bundle if other is None else quantized(other)
    graph = SwitchedGraph(*(ir.load(item.path / "encoder.onnx") for item in (second, quantized(name))))
    assert "encoder.encoders.0.feed_forward" in graph.layers
    assert ("encoder.encoders.0.self_attn" in graph.layers) == (other is None)
    for layers, expected in ((graph.layers, quantized(name)), ([], second)):
        found = Encoder(Switched(graph, layers), bundle.manifest.model).whole(features[0])
        np.testing.assert_allclose(found, expected.load().encode(features[0]), rtol=0, atol=2e-5)


def test_the_layer_that_hurts_is_found_with_its_channel(hurt, features):
    damage = DamageMeter(*hurt, features).measure()
    worst = max(damage.layers, key=lambda item: item.alone)
    assert worst.layer == HURT
    assert worst is max(damage.layers, key=lambda item: item.among_all)
    assert worst is max(damage.layers, key=lambda item: item.error)
    assert worst.outliers[HURT_VALUE] == [5]
    assert worst.bytes > 3 * worst.quantized_bytes
    assert damage.divergence > 0.5 * worst.alone
    assert {item.layer for item in damage.layers} >= {"encoder.embed", "ctc.ctc_lo", "encoder.encoders.0.feed_forward"}


def test_nothing_quantized_is_no_damage(hurt, features):
    meter = DamageMeter(*hurt, features)
    assert meter.total([]) == (0, 0)


def test_a_calibrated_bundle_reports_its_damage(hurt, recordings, tmp_path, capsys):
    """Smoothing has taken the outlier away; the table is in the report and on the screen."""
    source, plain = hurt
    arguments = ["quantize", str(source.path), str(tmp_path / "out"), "--calibrate", str(recordings)]
    assert main([*arguments, "--audio", str(recordings / "0.wav")]) == 0
    printed = capsys.readouterr().out
    damage = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["damage"]
    assert all(line in printed for line in describe_damage(damage))
    (item,) = (item for item in damage["layers"] if item["layer"] == HURT)
    assert HURT_VALUE not in item["outliers"]
    before = DamageMeter(source, plain, features_of(source, sorted(recordings.iterdir())))
    assert damage["divergence"] < 0.5 * before.total(before.layers)[0]
    assert Bundle.open(tmp_path / "out").manifest.quantization["calibration"] == {"seconds": pytest.approx(9, abs=0.2)}


def changed_tokens(reference, found, features):
    """Edits between the greedy texts of two bundles, as a share of the tokens of the first."""
    texts = [
        [ctc_greedy_search(model.ctc(model.encode(frames))).tokens for frames in features]
        for model in (reference.load(), found.load())
    ]
    return sum(map(edit_distance, *texts)) / sum(map(len, texts[0]))


def test_layers_beyond_smoothing_stay_in_float32(beyond_smoothing, features, recordings, tmp_path):
    files = sorted(recordings.iterdir())
    plain, _ = quantize_bundle(beyond_smoothing.path, tmp_path / "plain", recipe("int8", calibration=files))
    assert changed_tokens(beyond_smoothing, plain, features) > 1
    limited = recipe("int8", calibration=files, max_damage=0.5)
    made, _ = quantize_bundle(beyond_smoothing.path, tmp_path / "out", limited)
    assert made.manifest.quantization["exceptions"] == {"ctc.ctc_lo": "fp32"}
    assert changed_tokens(beyond_smoothing, made, features) <= 0.5
    assert (made.path / "ctc.onnx").stat().st_size > 2 * (plain.path / "ctc.onnx").stat().st_size
    assert (made.path / "encoder.onnx").read_bytes() == (plain.path / "encoder.onnx").read_bytes()
    shown = describe(inspect_bundle(made.path))
    assert "exceptions: ctc.ctc_lo in fp32" in shown


def test_experts_in_4_bits_come_back_in_int8(beyond_smoothing, quantized, recordings, tmp_path, monkeypatch):
    """That is their next better format. Here the damage is elsewhere, so that even all of them are not enough."""
    limited = recipe("int4-experts", calibration=sorted(recordings.iterdir()), max_damage=1)
    with pytest.raises(
        QuantizationError, match=r"change with all of .*encoders.0.feed_forward.* in int8, more than 100.00%"
    ):
        quantize_bundle(beyond_smoothing.path, tmp_path / "out", limited)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(run, "layers_to_spare", lambda meter, *_: (meter.layers[1:2], 0.0))
    made, _ = quantize_bundle(beyond_smoothing.path, tmp_path / "out", limited)
    assert made.manifest.quantization["exceptions"] == {"encoder.encoders.0.feed_forward": "int8"}
    functions = [layer["function"] for layer in inspect_bundle(made.path)["graphs"][0]["moe_layers"]]
    assert functions[:3] == ["Int4MixtureOfExperts", "Int8MixtureOfExperts", "Int4MixtureOfExperts"]


class Meter:
    """Damage that adds up."""

    layers = ("a", "b", "c", "d")

    def total(self, quantized):
        return 0.0, sum({"a": 0.4, "b": 0.1, "c": 0.0, "d": 0.02}[layer] for layer in quantized)


def measured(layer, alone, saved):
    return LayerDamage(
        layer=layer, bytes=saved + 1, quantized_bytes=1, alone=alone, among_all=alone, error=0.0, outliers={}
    )


@pytest.mark.parametrize(
    ("limit", "expected"), [(0.6, []), (0.2, ["a"]), (0.1, ["a", "b"]), (0.021, ["a", "b"]), (0.01, ["a", "b", "d"])]
)
def test_the_fewest_layers_are_spared(limit, expected):
    """By damage for each byte: `c` comes second, but turns out not to be needed."""
    layers = [measured("a", 4.0, 100), measured("b", 1.0, 200), measured("c", 1.0, 100), measured("d", 0.1, 900)]
    damage = Damage(frames=1, divergence=0.0, changed_tokens=0.52, layers=layers)
    spared, share = layers_to_spare(Meter(), damage, limit, lambda _: None)
    assert spared == expected
    assert share == pytest.approx(Meter().total([layer for layer in Meter.layers if layer not in expected])[1])
    assert share <= limit


def test_a_limit_beyond_all_layers_returns_them_all():
    layers = [measured(layer, 1.0, 100) for layer in Meter.layers]
    damage = Damage(frames=1, divergence=0.0, changed_tokens=0.52, layers=layers)
    spared, share = layers_to_spare(Meter(), damage, -0.01, lambda _: None)
    assert (sorted(spared), share) == (["a", "b", "c", "d"], 0)


def test_limits_that_cannot_be_met(bundle, recordings, tmp_path):
    """Too few tokens to tell, and a better format that is not enough; nothing is written."""
    few = recipe("int8", calibration=[recordings / "0.wav"], max_damage=1e-4)
    with pytest.raises(
        AudioError, match=r"found \d+ tokens in the first 120 s.*expected recordings with at least 10000 tokens"
    ):
        quantize_bundle(bundle.path, tmp_path / "out", few)
    for limit in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="max_damage must be above 0, at most 1, and needs calibration"):
            recipe("int8", calibration=[recordings / "0.wav"], max_damage=limit)
    with pytest.raises(ValueError, match="needs calibration"):
        recipe("int8", max_damage=0.1)
    assert not (tmp_path / "out").exists()
