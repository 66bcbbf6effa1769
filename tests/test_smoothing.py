"""Large activation channels move into the weights: equal in float32, and harmless in int8."""

import numpy as np
import onnx_ir as ir
import pytest
from noise import write_noise
from wenet_directories import write_configuration

from u2moe.quantize import quantize_bundle, recipe
from u2moe.quantize.arithmetic import relative_error
from u2moe.quantize.report import features_of
from u2moe.quantize.rounding import Activations, recorded
from u2moe.quantize.smoothing import rewritten_bundle, scale, sites_of, smooth
from u2moe.runtime import Bundle

HYPOTHESES = [[1, 2, 3], [4], []]


@pytest.fixture(scope="module", params=["moe_tiny", pytest.param("dense_tiny", marks=pytest.mark.endurance)])
def plain(request, exported):
    return Bundle.open(exported(request.param))


@pytest.fixture(scope="module")
def hard(plain, tmp_path_factory):
    """The bundle with outliers: at least one of the channels of every site is 32 to 256 times as large."""

    def add_outliers(model):
        random = np.random.default_rng(0)
        for site in sites_of(model):
            exponents = np.zeros(len(site.columns), np.int64)
            number = max(1, len(exponents) // 100)
            exponents[random.choice(len(exponents), number, replace=False)] = -random.integers(5, 9, number)
            scale(site, exponents)

    return rewritten_bundle(plain, tmp_path_factory.mktemp("hard") / "bundle", add_outliers)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return sorted(write_noise(tmp_path_factory.mktemp("recordings"), 3, 48_000).iterdir())


def outputs(bundle, frames):
    """Everything that a bundle computes of features."""
    model = bundle.load()
    encoded, streamed = model.encode(frames), model.encode(frames, 8, 2)
    return [encoded, streamed, model.ctc(encoded), *model.rescore(encoded, HYPOTHESES)]


@pytest.mark.slow
def test_outliers_and_their_removal_change_no_bit_in_float32(plain, hard, recordings, tmp_path):
    (frames,) = features_of(plain, recordings[:1])
    activations = recorded(hard, features_of(plain, recordings[1:]), tmp_path)
    smoothed = rewritten_bundle(hard, tmp_path / "smoothed", lambda model: smooth(model, activations))
    again = recorded(smoothed, features_of(plain, recordings[1:]), tmp_path)
    for site in sites_of(ir.load(smoothed.path / "encoder.onnx")):
        if site.name:  # what was recorded is scaled with the graph
            np.testing.assert_array_equal(again.rows(site.name), activations.rows(site.name))
    for expected, *others in zip(*(outputs(item, frames) for item in (plain, hard, smoothed)), strict=True):
        for found in others:
            np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_int8_loses_to_outliers_until_they_are_smoothed(plain, hard, recordings, tmp_path):
    """Then it is as good as without outliers; the decoders, of which nothing is recorded, are repaired, too."""
    (frames,) = features_of(plain, recordings[:1])
    calibrated = recipe("int8", calibration=recordings[1:])
    expected = outputs(plain, frames)
    errors = []
    for number, (bundle, by) in enumerate([(plain, recipe("int8")), (hard, recipe("int8")), (hard, calibrated)]):
        made, _ = quantize_bundle(bundle.path, tmp_path / str(number), by)
        found = outputs(made, frames)
        # The decoders read the encoder output, which CTC and they share and no site can scale.
        decoded = made.load().rescore(expected[0], HYPOTHESES)
        errors.append(
            [relative_error(expected[0], found[0]), relative_error(np.array(expected[3:]), np.array(decoded))]
        )
    (encoder, decoder), (hard_encoder, hard_decoder), (smooth_encoder, smooth_decoder) = errors
    assert hard_encoder > 4 * encoder
    assert smooth_encoder < 1.5 * encoder
    assert hard_decoder > 2 * smooth_decoder
    assert smooth_decoder < 2 * decoder


def test_sites_are_where_nothing_else_reads_the_channels(plain):
    """Nor is anything scaled that leaves the graph, or whose weight has another use."""
    model = ir.load(plain.path / "encoder.onnx")
    names = {site.name for site in sites_of(model)}
    assert any("norm_mha" in name for name in names)
    assert any("Attention" in name for name in names)
    assert not any("after_norm" in name for name in names)
    read_twice, shared, leaves = [site for site in sites_of(model) if site.name][:3]
    model.graph.append(ir.node("Abs", [read_twice.value]))
    model.graph.append(ir.node("Abs", [shared.read[0]]))
    model.graph.outputs.append(leaves.value)
    assert not {read_twice.name, shared.name, leaves.name} & {site.name for site in sites_of(model)}


def test_channels_of_equal_size_stay(plain, tmp_path):
    """Rows and weights without differences give no reason to scale."""
    model = ir.load(plain.path / "encoder.onnx")
    for site in sites_of(model):
        for weight in site.read:
            weight.const_value = ir.tensor(np.ones(weight.const_value.shape.numpy(), np.float32), name=weight.name)
    activations = Activations(tmp_path)
    for site in sites_of(model):
        if site.name:
            activations.add(site.name, np.ones((4, len(site.channels)), np.float32))
    assert smooth(model, activations) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated", "moe_gqa_rms_norm", "relu", "post_norm", "transformer_moe"])
def test_every_kind_of_layer_stays_equal(name, export_quickly, tmp_path):
    """All sites scaled at random; in a network with post-norm, residuals read the normalisations, too."""
    written = export_quickly(write_configuration(name, tmp_path / "checkpoint", vocab_size=31), tmp_path / "bundle")
    bundle, num_sites = Bundle.open(written), []

    def scale_all(model):
        random = np.random.default_rng(0)
        num_sites.append(len(sites_of(model)))
        for site in sites_of(model):
            scale(site, random.integers(-9, 9, len(site.columns)))

    scaled = rewritten_bundle(bundle, tmp_path / "scaled", scale_all)
    assert num_sites[0] >= 2
    frames = np.random.default_rng(1).normal(size=(90, bundle.manifest.model.feature_size)).astype(np.float32)
    for expected, found in zip(outputs(bundle, frames), outputs(scaled, frames), strict=True):
        np.testing.assert_array_equal(found, expected)
