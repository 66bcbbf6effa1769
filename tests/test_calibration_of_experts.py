"""Rounding to integers, plainly and for recordings: arithmetic, bundles, errors, and the command."""

import numpy as np
import onnx_ir as ir
import pytest
import soundfile
from corpora import write_noise
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from u2moe.quantize import quantize_bundle, recipe
from u2moe.quantize.arithmetic import NOTHING, from_int4_blocks, int4_blocks, int8_columns, int8_rows, relative_error
from u2moe.quantize.formats import CONVERSIONS, conversion
from u2moe.quantize.recordings import features_of
from u2moe.quantize.report import describe
from u2moe.quantize.rounding import RoundedWeight, compensated, fitted, fitted_layer, recorded
from u2moe.quantize.smoothing import rewritten_bundle, smooth
from u2moe.runtime import AudioError, Bundle
from u2moe.runtime.cli import main
from u2moe.runtime.decoding.ctc import Hypothesis

MATRICES = arrays(np.float32, st.tuples(st.integers(1, 70), st.integers(1, 9)), elements=st.floats(-100, 100, width=32))


def fits_16_bits(integers):
    """Return whether rows 2k and 2k + 1 of an int8 weight, times any uint8, have sums that fit into 16 bits."""
    pairs = np.pad(integers.astype(int), ((0, len(integers) % 2), (0, 0))).reshape(-1, 2, integers.shape[1])
    highest, lowest = (255 * side(pairs, 0).sum(axis=1) for side in (np.maximum, np.minimum))
    return highest.max() <= 32767 and lowest.min() >= -32768


def test_int8_weights_have_all_levels_and_int4_is_better_than_a_float_for_every_block():
    integers, _ = int8_columns(np.array([[1, 0.5, 1], [-1, 0.25, 1], [0.5, -0.125, 1]], np.float32))
    np.testing.assert_array_equal(integers, [[127, 85, 64], [-127, 42, 64], [64, -21, 64]])
    # Symmetric weights with the best of six float32 scales per block of 32 have an error of 0.0824
    weight = np.random.default_rng(1).standard_normal((576, 100)).astype(np.float32)
    made = int4_blocks(weight, 32)
    assert relative_error(weight, from_int4_blocks(made, 576)) < 0.0815
    assert np.abs(from_int4_blocks(made._replace(scale=np.ones(100, np.float32)), 576)).max() <= 127


@given(MATRICES)
def test_int8_rows_have_a_scale_each_and_room_in_pairs(weight):
    integers, scale = int8_rows(weight)
    assert scale.shape == (len(weight), 1)
    assert (np.abs(integers * scale - weight) <= scale * 0.501).all()
    assert (np.abs(integers).max(axis=1) == 127 * (np.abs(weight).max(axis=1) > NOTHING)).all()
    # A column is within half a step and symmetric, and also uses the full range of 8 bits, or of a pair
    integers, scale = int8_columns(weight)
    assert integers.min() >= -127
    assert (np.abs(integers * scale - weight) <= scale * 0.501).all()
    np.testing.assert_array_equal(int8_columns(-weight)[0], -integers)
    assert fits_16_bits(integers)
    pairs = [integers[index : index + 2].sum(axis=0, dtype=int) for index in range(0, len(integers), 2)]
    used = np.maximum(np.abs(integers).max(axis=0), np.abs(pairs).max(axis=0))
    assert (used[np.abs(weight).max(axis=0) > NOTHING] >= 126).all()


@given(MATRICES, st.sampled_from([16, 32, 64]))
def test_int4_is_at_least_as_good_as_plain_rounding(weight, block_size):
    """This is checked in every block. Its step is that of its weights, rounded up to the steps of its column."""
    made = int4_blocks(weight, block_size)
    restored = from_int4_blocks(made, len(weight))
    for block in range(made.steps.shape[1]):
        rows = slice(block * block_size, (block + 1) * block_size)
        largest = np.abs(weight[rows]).max(axis=0)
        error = np.square(restored[rows] - weight[rows], dtype=np.float64).sum(axis=0)
        assert (error <= block_size * np.square(0.501 * (largest / 7 + made.scale)) + NOTHING).all()


FOUR, FINE = conversion("int4", 32), conversion("int4", 16)
MADE = [*(conversion(name) for name in CONVERSIONS), FINE, conversion("int4", 64)]
ONES = np.ones(2000, np.float32)
RANDOM = np.random.default_rng(0)
DIRECTIONS = RANDOM.normal(size=(80, 80)) * np.geomspace(1, 0.02, 80)[:, np.newaxis]
CORRELATED = (RANDOM.normal(size=(2000, 80)) @ DIRECTIONS + RANDOM.normal(size=80)).astype(np.float32)
"""Inputs [n, in] like those in a network: most energy in few directions, and a mean."""
WEIGHT = np.random.default_rng(1).normal(size=(80, 24)).astype(np.float32)


def inputs_of(inputs, others=None):
    return lambda rows: (inputs[rows], (inputs if others is None else others)[rows])


@pytest.mark.parametrize("made", MADE, ids=str)
def test_compensated_rounding_changes_outputs_less(made):
    """80 rows are not a multiple of 32 or 64. Pairs of rows in int8 still fit in 16 bits. Without correlation, the
    result is the same as without recordings."""
    moments = (CORRELATED.T @ CORRELATED).astype(np.float64)
    moments[np.diag_indices(80)] += 1e-3 * moments.trace() / 80
    found, plain = compensated(WEIGHT, moments, made), made.parts(WEIGHT)
    expected = CORRELATED @ WEIGHT
    errors = [relative_error(expected, CORRELATED @ made.restored(own, 80)) for own in (found, plain)]
    assert errors[0] < 0.6 * errors[1]
    assert found[0].dtype != np.int8 or fits_16_bits(found[0])
    if made.block_size <= 16:
        for part, others in zip(compensated(WEIGHT, np.eye(80), made), plain, strict=True):
            np.testing.assert_array_equal(part, others)


def test_biases_take_the_mean_error_and_a_product_makes_up_for_wrong_inputs():
    bias = np.linspace(-1, 1, 24).astype(np.float32)
    product = fitted(inputs_of(CORRELATED), ONES, WEIGHT, bias, FOUR)
    np.testing.assert_allclose((product(CORRELATED) - (CORRELATED @ WEIGHT + bias)).mean(axis=0), 0, atol=1e-3)
    assert fitted(inputs_of(CORRELATED), ONES, WEIGHT, None, FOUR).bias is None
    # The second product of an expert reads the output of the rounded first: here inputs that are too small
    product = fitted(inputs_of(CORRELATED, CORRELATED * 0.8), ONES, WEIGHT, None, FINE)
    assert relative_error(CORRELATED @ WEIGHT, product(CORRELATED * 0.8)) < 0.08


def test_tokens_count_by_the_share_of_the_expert_and_silence_gives_plain_rounding():
    """Two halves of the tokens have different directions. The half with large shares has the smaller error."""
    tokens = np.concatenate([CORRELATED, CORRELATED[:, ::-1]])
    errors = []
    for shares in ([1, 0.05], [0.05, 1]):
        product = fitted(inputs_of(tokens), np.repeat(np.float32(shares), 2000), WEIGHT, None, FOUR)
        errors.append(relative_error(CORRELATED @ WEIGHT, product(CORRELATED)))
    assert errors[0] < 0.8 * errors[1]
    # Tokens without variance cause no division by zero and no NaN weight
    silent = np.zeros((100, 80), np.float32)
    product = fitted(inputs_of(silent), ONES[:100], WEIGHT, np.zeros(24, np.float32), FINE)
    np.testing.assert_array_equal(product.parts[0], FINE.parts(WEIGHT)[0])


def test_rows_in_pieces_give_the_same_layer(monkeypatch):
    """Only the last bits of sums differ, which rounds some numbers the other way."""
    products = [(WEIGHT, np.ones(24, np.float32)), (WEIGHT.T.copy(), None)]
    given = products, np.tanh, CORRELATED, np.linspace(0, 1, 2000, dtype=np.float32), FOUR
    whole = fitted_layer(*given)
    monkeypatch.setattr("u2moe.quantize.rounding.PIECE_ROWS", 300)
    for found, expected in zip(fitted_layer(*given), whole, strict=True):
        assert (found.parts[0] != expected.parts[0]).mean() < 0.02
        assert relative_error(expected.weight, found.weight) < 0.02


@pytest.mark.parametrize("gated", [False, True])
def test_a_layer_is_better_with_all_products_rounded_for_it(gated):
    """The reference rounds each product to the nearest value. A gated layer's first product is its gate."""
    random = np.random.default_rng(2)
    b1, b2, w2 = (random.normal(size=size).astype(np.float32) for size in (24, 80, (24, 80)))
    weight = 0.05 * WEIGHT  # otherwise tanh returns only 1 and -1
    first = [(weight, None), (weight[:, ::-1].copy(), None)] if gated else [(weight, b1)]
    products = [*first, (w2, None if gated else b2)]

    def said(products):
        *hidden, last = products
        return last(np.tanh(hidden[0](CORRELATED)) * (hidden[1](CORRELATED) if gated else 1))

    expected = said([RoundedWeight((), *product) for product in products])
    nearest = [RoundedWeight((), FINE.restored(FINE.parts(own), len(own)), bias) for own, bias in products]
    found = said(fitted_layer(products, np.tanh, CORRELATED, ONES, FINE))
    assert relative_error(expected, found) < 0.7 * relative_error(expected, said(nearest))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return sorted(write_noise(tmp_path_factory.mktemp("recordings"), 6, 64_000).iterdir())


@pytest.mark.slow
def test_calibrated_experts_are_nearer_to_float32(small_bundle, recordings, tmp_path):
    """Errors are smaller than without calibration, on other sounds of that kind."""
    made = []
    for chosen in (recipe("int4-experts"), recipe("int4-experts", calibration=recordings)):
        made.append(quantize_bundle(small_bundle.path, tmp_path / str(len(made)), chosen)[0])
    noise = np.random.default_rng(9).standard_normal(64_000) * np.abs(np.sin(np.arange(64_000) / 2500)) * 0.2
    soundfile.write(tmp_path / "noise.wav", noise, 16_000)
    (frames,) = features_of(small_bundle, [tmp_path / "noise.wav"])
    models = [item.load() for item in (small_bundle, *made)]
    expected, plain, found = (model.ctc(model.encode(frames)) for model in models)
    assert relative_error(expected, found) < 0.9 * relative_error(expected, plain)  # 0.81 with torch 2.15


@pytest.mark.slow
def test_manifest_and_report_say_what_was_calibrated(small_bundle, recordings, tmp_path):
    one = recipe("int4-experts", calibration=recordings[:1])
    soundfile.write(tmp_path / "short.wav", soundfile.read(recordings[1])[0][:16_000], 16_000)
    out, report = quantize_bundle(small_bundle.path, tmp_path / "out", one, audio=[tmp_path / "short.wav"])
    said = out.manifest.quantization["calibration"]
    assert report["recipe"]["calibration"] == said
    assert said["plain_products"] + said["compensated_products"] == 32 + 33  # experts, and other layers
    assert said["plain_products"] > 0
    assert 3.9 < said["seconds"] <= 4
    assert f"not the {said['plain_products']} that received fewer tokens" in describe(report)


@pytest.mark.slow
def test_experts_without_enough_tokens_are_smoothed_and_rounded_alone(small_bundle, tmp_path):
    """A third of a second gives no expert as many tokens as it has inputs."""
    file = tmp_path / "short.wav"
    soundfile.write(file, np.random.default_rng(0).normal(size=5000) * 0.1, 16_000)
    out, _ = quantize_bundle(small_bundle.path, tmp_path / "out", recipe("int4-experts", calibration=[file]))
    assert out.manifest.quantization["calibration"]["compensated_products"] == 0
    activations = recorded(small_bundle, features_of(small_bundle, [file]), tmp_path)
    smoothed = rewritten_bundle(small_bundle, tmp_path / "smoothed", lambda models: smooth(models, activations))
    rounded, _ = quantize_bundle(smoothed.path, tmp_path / "rounded", recipe("int4-experts"))
    plain, found = (ir.load(item.path / "encoder.onnx").graph.initializers for item in (rounded, out))
    assert plain.keys() == found.keys()
    for name in [name for name, value in plain.items() if value.const_value is not None]:
        np.testing.assert_array_equal(*(each[name].const_value.numpy() for each in (plain, found)), err_msg=name)


@pytest.mark.slow
def test_what_several_graphs_read_counts_once(bundle, model, recordings, tmp_path):
    """The encoder's output is an input of CTC head and decoder; counted twice, its rows would seem enough."""
    features = features_of(bundle, recordings[:2])
    num_frames = sum(len(model.encode(frames)) for frames in features)
    assert len(recorded(bundle, features, tmp_path).rows("encoder_out")) == num_frames


@pytest.mark.slow
def test_calibration_without_speech_is_an_error(bundle, recordings, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "short.wav", np.zeros(160), 16_000)
    monkeypatch.setattr("u2moe.quantize.rounding.ctc_greedy_search", lambda _: Hypothesis(tokens=[], score=0, times=[]))
    for file, message in (
        (tmp_path / "short.wav", "too short for the encoder"),
        (tmp_path / "none.wav", "none.wav"),
        (recordings[0], "finds no speech in the recordings"),
    ):
        with pytest.raises(AudioError, match=message):
            quantize_bundle(bundle.path, tmp_path / "out", recipe("int8", calibration=[file]))
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_command_takes_files_folders_and_lists(small_bundle, recordings, tmp_path, capsys):
    (tmp_path / "list.tsv").write_text(f"{recordings[0]}\tone\n", encoding="utf-8")
    folder = write_noise(tmp_path / "folder", 2, 16_000)
    paths = [str(tmp_path / "list.tsv"), str(recordings[1]), str(folder)]
    arguments = ["quantize", str(small_bundle.path), str(tmp_path / "out"), "--no-report", "--calibrate", *paths]
    assert main([*arguments, "--recipe", "int4-experts", "--accept-damage"]) == 0
    assert "recognising recordings: #" in capsys.readouterr().err
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in small_bundle.path.iterdir()}
    found = Bundle.open(tmp_path / "out").manifest.quantization["calibration"]
    assert found["seconds"] == pytest.approx(4 + 4 + 2, abs=0.5)
    assert main([*arguments, "--overwrite", "--recipe", "fp16"]) == 1
    assert "calibration applies only to weights in int8 and int4" in capsys.readouterr().err
