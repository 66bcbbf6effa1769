"""What is done where the processor adds pairs of products in 16 bits, and about bundles that were quantized before."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from u2moe.runtime.bundle import contract
from u2moe.runtime.cli import main
from u2moe.runtime.errors import ProviderError
from u2moe.runtime.model import saturation
from u2moe.runtime.model.saturation import PRECISE, Products, exact_products, must_be_precise
from u2moe.runtime.recognizer import DEMO_FOLDER

FITTING = {contract.PAIR_SUMS: contract.PAIR_SUMS_FIT}
FOLDER = Path("bundle")


def test_the_product_is_what_it_says():
    model = onnx.load_from_string(saturation._PRODUCT)
    assert [node.op_type for node in model.graph.node] == ["MatMulInteger"]
    found = [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)]
    assert found == [onnx.TensorProto.UINT8, onnx.TensorProto.INT8, onnx.TensorProto.INT32]


def test_its_weights_are_the_most_that_fits_and_more(fits_16_bits):
    paired, largest = np.array(saturation._PAIRED), np.array(saturation._LARGEST)
    assert fits_16_bits(paired)
    assert not fits_16_bits(largest)
    above = paired + np.sign(paired) * (np.abs(paired) == 64)
    assert all(not fits_16_bits(above[:, [column]]) for column in np.flatnonzero((above != paired).any(axis=0)))


def test_weights_in_pairs_are_exact_here():
    """On every processor; whether any are depends on it."""
    assert exact_products().paired


@pytest.fixture
def without_vnni(monkeypatch):
    monkeypatch.setattr(saturation, "exact_products", lambda: Products(any=False, paired=True))


def test_where_all_is_exact_nothing_is_to_be_done(monkeypatch):
    monkeypatch.setattr(saturation, "exact_products", lambda: Products(any=True, paired=True))
    assert not must_be_precise(FOLDER, {}, None)


def test_weights_that_fit_need_nothing(without_vnni):
    assert not must_be_precise(FOLDER, FITTING, None)


def test_a_processor_that_gets_even_these_wrong_is_noticed(monkeypatch):
    monkeypatch.setattr(saturation, "exact_products", lambda: Products(any=False, paired=False))
    with pytest.warns(UserWarning, match="takes longer"):
        assert must_be_precise(FOLDER, FITTING, None)


@pytest.mark.parametrize("version", ["1.30.0", "1.32.0", "2.0"])
def test_weights_of_before_need_an_option(without_vnni, monkeypatch, version):
    monkeypatch.setattr(onnxruntime, "__version__", version)
    with pytest.warns(UserWarning, match="bundle: takes longer"):
        assert must_be_precise(FOLDER, {}, None)


def test_weights_of_before_are_refused_by_versions_that_break_on_the_option(without_vnni, monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", "1.29.1")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*PRECISE)
    for given in (None, options):
        with pytest.raises(ProviderError, match=r"bundle: .* onnxruntime 1\.30 or newer \(this is 1\.29\.1\)"):
            must_be_precise(FOLDER, {}, given)


def test_options_of_the_caller_are_left_alone(without_vnni):
    options = onnxruntime.SessionOptions()
    with pytest.raises(ProviderError, match=r"results would be wrong .* set session\.x64quantprecision to '1'"):
        must_be_precise(FOLDER, {}, options)
    options.add_session_config_entry(*PRECISE)
    assert not must_be_precise(FOLDER, {}, options)


def option_of(model):
    try:
        return model.encoder.session._session.get_session_options().get_session_config_entry(PRECISE[0])
    except RuntimeError:
        return None


def test_bundles_of_before_are_loaded_with_the_option_and_say_so_once(without_vnni, quantized_before):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        precise = quantized_before.load(kernels="onnxruntime")
    assert [str(warning.message).partition(": ")[0] for warning in caught] == [str(quantized_before.path)]
    assert option_of(precise) == "1"
    features = np.random.default_rng(0).normal(10, 3, (100, precise.config.feature_size)).astype(np.float32)
    plain = quantized_before.load(sess_options=precise_options(), kernels="onnxruntime")
    np.testing.assert_allclose(precise.encode(features), plain.encode(features), atol=1e-5)


def precise_options():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry(*PRECISE)
    return options


def test_bundles_of_today_and_float32_ones_are_not(without_vnni, quantized, bundle):
    assert option_of(quantized("int8").load()) is None
    assert option_of(bundle.load()) is None


def test_bundles_of_before_are_refused_if_the_option_cannot_be_set(without_vnni, quantized_before, monkeypatch, capsys):
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.4")
    with pytest.raises(ProviderError, match="quantize the float32 bundle again"):
        quantized_before.load(kernels="onnxruntime")
    clip = str(DEMO_FOLDER / "clips" / "command.flac")
    assert main(["transcribe", "--model", str(quantized_before.path), "--kernels", "onnxruntime", clip]) == 1
    assert "results would be wrong on this processor" in capsys.readouterr().err
