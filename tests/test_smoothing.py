"""Large activation channels move into the weights: identical in float32, and harmless in int8."""

import re

import numpy as np
import onnx_ir as ir
import pytest
from corpora import write_noise

from u2moe.quantize import quantize_bundle, recipe
from u2moe.quantize.arithmetic import relative_error
from u2moe.quantize.recordings import features_of
from u2moe.quantize.rounding import Activations, recorded
from u2moe.quantize.smoothing import rewritten_bundle, scale, sites_of, smooth
from u2moe.runtime import Bundle

HYPOTHESES = [[1, 2, 3], [4], []]
PARTS = [slice(0, 1), slice(2, 4)]  # of `outputs`: log-probabilities, and scores of the decoders
KINDS = ("norms", "heads", "front", "projection", "output")  # combined by "all"


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return sorted(write_noise(tmp_path_factory.mktemp("recordings"), 3, 24_000).iterdir())


@pytest.fixture(scope="module")
def calibrated_recipe(recordings):
    return recipe("int8", calibration=recordings[1:])


@pytest.fixture(scope="module")
def known(small_bundle, recordings):
    """Return features, and the outputs for them."""
    (frames,) = features_of(small_bundle, recordings[:1])
    return frames, outputs(small_bundle, frames)


def outputs(bundle, frames):
    """Compute all outputs of a bundle for features, except the encoder output, whose channels are scaled."""
    model = bundle.load()
    encoded, streamed = model.encode(frames), model.encode(frames, 8, 2)
    return [model.ctc(encoded), model.ctc(streamed), *model.rescore(encoded, HYPOTHESES)]


def check_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_outliers_and_their_removal_change_no_bit_in_float32(small_bundle, recordings, known, tmp_path):
    """At each site, at least one channel becomes 32 to 256 times as large."""

    def add_outliers(models):
        random = np.random.default_rng(0)
        for site in sites_of(*models):
            exponents = np.zeros(len(site.columns), np.int64)
            number = max(1, len(exponents) // 100)
            exponents[random.choice(len(exponents), number, replace=False)] = -random.integers(5, 9, number)
            scale(site, exponents)

    hard = rewritten_bundle(small_bundle, tmp_path / "hard", add_outliers)
    activations = recorded(hard, features_of(small_bundle, recordings[1:]), tmp_path)
    smoothed = rewritten_bundle(hard, tmp_path / "smoothed", lambda models: smooth(models, activations))
    again = recorded(smoothed, features_of(small_bundle, recordings[1:]), tmp_path)
    for site in sites_of(*(ir.load(smoothed.path / graph.file) for graph in small_bundle.manifest.model.graphs())):
        if site.name:  # recorded rows are scaled with the graph
            np.testing.assert_array_equal(again.rows(site.name), activations.rows(site.name))
    for bundle in (hard, smoothed):
        check_equal(outputs(bundle, known[0]), known[1])


@pytest.fixture(scope="module")
def calibrated_plain(small_bundle, calibrated_recipe, tmp_path_factory):
    return quantize_bundle(small_bundle.path, tmp_path_factory.mktemp("calibrated") / "bundle", calibrated_recipe)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all", "tiny", *(pytest.param(kind, marks=pytest.mark.endurance) for kind in KINDS)])
def test_rescalings_in_float32_cost_nothing(kind, small_bundle, calibrated_plain, calibrated_recipe, known, tmp_path):
    """The rescalings do not use `sites_of`."""
    frames, expected = known
    rescaled = rewritten_bundle(small_bundle, tmp_path / "rescaled", lambda models: rescale(models, kind))
    check_equal(outputs(rescaled, frames), expected)
    calibrated, _ = quantize_bundle(rescaled.path, tmp_path / "out", calibrated_recipe)
    errors = []
    for made in (calibrated_plain, calibrated):
        found = outputs(made, frames)
        errors.append([relative_error(np.array(expected[part]), np.array(found[part])) for part in PARTS])
    plainly, smoothly = errors
    assert smoothly[0] < 1.25 * plainly[0]
    assert smoothly[1] < 1.5 * plainly[1]
    if kind != "tiny":  # which changes all channels of a token alike
        lost, _ = quantize_bundle(rescaled.path, tmp_path / "int8", recipe("int8"))
        assert relative_error(expected[0], outputs(lost, frames)[0]) > 1.5 * smoothly[0]
    sizes = [sum(file.stat().st_size for file in made.path.glob("*.onnx*")) for made in (calibrated_plain, calibrated)]
    assert sizes[0] == sizes[1]


CHANNELS = [
    ("front", "encoder.embed.conv.0", r"encoder\.embed\.conv\.2\.weight", 1),
    ("projection", "encoder.embed.conv.2", r"encoder\.embed\.(linear|out\.0)\.weight", 0),
    ("norms", "encoder.encoders.0.norm_mha", r"encoder\.encoders\.0\.self_attn\.linear_(q|kv)\.weight", 0),
    ("norms", "encoder.encoders.1.norm_mha", r"encoder\.encoders\.1\.self_attn\.linear_(q|kv)\.weight", 0),
    ("output", "encoder.after_norm", r"ctc\.ctc_lo\.weight|.*src_attn\.linear_kv\.weight", 0),
]
"""Kinds, layers with these channels, weights that read them, and the axis of the latter."""


def rescale(models, kind):
    random = np.random.default_rng(7)
    weights = {name: value for model in models for name, value in model.graph.initializers.items()}

    def multiply(exponents, name, axis=0):
        array = np.moveaxis(weights[name].const_value.numpy(), axis, -1)
        repeated = np.repeat(exponents, array.shape[-1] // len(exponents))
        weights[name].const_value = ir.tensor(np.moveaxis(np.ldexp(array, repeated), -1, axis), name=name)

    for own, layer, readers, axis in CHANNELS:
        if kind in (own, "all"):
            exponents = np.zeros(weights[f"{layer}.bias"].const_value.size, int)
            exponents[random.choice(len(exponents), max(1, len(exponents) // 25), replace=False)] = 8
            for part in ("weight", "bias"):
                multiply(exponents, f"{layer}.{part}")
            for name in filter(re.compile(readers).fullmatch, weights):
                multiply(-exponents, name, axis)
    for block in range(2) if kind in ("heads", "all", "tiny") else ():
        attention = f"encoder.encoders.{block}.self_attn"
        by_head = np.full(4, -20) if kind == "tiny" else np.array([-6, 0, 3, 6])
        both = np.stack([np.zeros(4, int), by_head]).T.ravel()  # keys and values of each head
        multiply(both, f"{attention}.linear_kv.weight", -1)
        multiply(both, f"{attention}.linear_kv.bias")
        multiply(-by_head, f"{attention}.linear_out.weight")


def test_sites_are_where_nothing_else_reads_channels_of_different_size(small_bundle, tmp_path):
    model = ir.load(small_bundle.path / "encoder.onnx")
    for part, is_site in (("norm_mha", True), ("Attention", True), ("after_norm", False)):
        assert any(part in site.name for site in sites_of(model)) == is_site
    read_twice, shared, leaves = [site for site in sites_of(model) if site.name][:3]
    model.graph.append(ir.node("Abs", [read_twice.value]))
    model.graph.append(ir.node("Abs", [shared.read[0]]))
    model.graph.outputs.append(leaves.value)
    assert not {read_twice.name, shared.name, leaves.name} & {site.name for site in sites_of(model)}
    # Rows and weights without differences are not scaled
    model, activations = ir.load(small_bundle.path / "encoder.onnx"), Activations(tmp_path)
    for site in sites_of(model):
        for weight in site.read:
            weight.const_value = ir.tensor(np.ones(weight.const_value.shape.numpy(), np.float32), name=weight.name)
        if site.name:
            activations.add(site.name, np.ones((4, len(site.channels)), np.float32))
    assert smooth([model], activations) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["gated", "moe_gqa_rms_norm", "post_norm",
     *(pytest.param(name, marks=pytest.mark.endurance) for name in ("relu", "transformer_moe"))],
)  # fmt: skip
def test_every_kind_of_layer_stays_equal(name, exported, tmp_path):
    """All sites are scaled at random. In a post-norm network, residuals also read the normalisations."""
    bundle, num_sites = Bundle.open(exported(name)), []

    def scale_all(models):
        random, sites = np.random.default_rng(0), sites_of(*models)
        num_sites.append(len(sites))
        for site in sites:
            scale(site, random.integers(-9, 9, len(site.columns)))

    scaled = rewritten_bundle(bundle, tmp_path / "scaled", scale_all)
    assert num_sites[0] >= 2
    frames = np.random.default_rng(1).normal(size=(90, bundle.manifest.model.feature_size)).astype(np.float32)
    check_equal(outputs(scaled, frames), outputs(bundle, frames))
