import dataclasses
import types

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from static_damage import SHORTER, damaged, shorter

from u2moe.runtime import Bundle, BundleError, ProviderError, Recognizer
from u2moe.runtime.bundle import contract
from u2moe.runtime.model import native
from u2moe.runtime.model import session as model_session
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import SessionSettings


def session(bundle, graph=None, manifest=None, settings=None, file=None):
    graph = graph or contract.ctc()
    return Session(file or bundle.path / graph.file, graph, manifest or bundle.manifest, settings or SessionSettings())


def test_outputs_by_name_and_graphs_of_other_bundles(bundle, capfd):
    outputs = session(bundle).run({"encoder_out": np.zeros((2, 5, 64), np.float32)})
    assert {name: array.shape for name, array in outputs.items()} == {"log_probs": (2, 5, 60)}
    with pytest.raises(BundleError, match=r"encoder\.onnx: inputs are \['chunk'"):
        session(bundle, file=bundle.path / "encoder.onnx")
    features = dataclasses.replace(bundle.manifest.features, sample_rate=8000)
    with pytest.raises(BundleError, match=r"metadata u2moe\.sample_rate is '16000', expected '8000'"):
        session(bundle, manifest=dataclasses.replace(bundle.manifest, features=features))
    with pytest.raises(ProviderError, match=r"ctc failed on CPUExecutionProvider for \{'encoder_out': \(2, 3\)\}"):
        session(bundle).run({"encoder_out": np.zeros((2, 3), np.float32)})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("graph", "output", "axis"), SHORTER)
def test_outputs_of_unexpected_shapes_are_refused_by_name(bundle, sound, tmp_path, graph, output, axis):
    other = Bundle.open(damaged(bundle.path, tmp_path / "damaged", f"{graph}.onnx", shorter(output, axis)))
    with pytest.raises((BundleError, ProviderError), match=rf"{graph}\.onnx: output {output}.*, expected"):
        Recognizer(other, other.load()).transcribe(sound)


def test_providers_that_are_missing_or_do_not_start_are_errors(bundle, monkeypatch):
    with pytest.raises(ProviderError, match=r"RocketExecutionProvider is not installed: .*; installed: .*CPUExecution"):
        bundle.load(SessionSettings(providers=["RocketExecutionProvider", "CPUExecutionProvider"]))
    with pytest.raises(ProviderError, match=r": it is in the package onnxruntime-directml \(Windows\)"):
        bundle.load(SessionSettings(providers=["DmlExecutionProvider"]))
    available = onnxruntime.get_available_providers()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", *available])
    settings = SessionSettings(providers=("CUDAExecutionProvider",))
    if "CUDAExecutionProvider" in available:
        pytest.skip("this machine has the provider")
    with pytest.raises(ProviderError, match="CUDAExecutionProvider"), pytest.warns(UserWarning, match="CUDA"):
        session(bundle, settings=settings)


@pytest.mark.parametrize("recipe", ["int8", "int8-experts"])
def test_openvino_never_gets_what_it_crashes_on(quantized, monkeypatch, recipe):
    """No session is created, because a crash would end the application."""
    bundle = quantized(recipe)
    available = [*onnxruntime.get_available_providers(), "OpenVINOExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.1")
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_args, **_options: pytest.fail("a session was made"))
    with pytest.raises(ProviderError, match=r"OpenVINOExecutionProvider of onnxruntime 1\.24\.1 cannot compute"):
        bundle.load(SessionSettings(providers=["OpenVINOExecutionProvider"]))


@pytest.fixture
def without_products(monkeypatch):
    """onnxruntime 1.21 to 1.24 on a processor with AMX: some integer products remain unset."""
    real = onnxruntime.InferenceSession

    def made(graph, *args, **options):
        found = real(graph, *args, **options)
        if graph is not model_session._PRODUCT:
            return found
        products = found.run(None, {"a": np.ones((64, 4), np.uint8)})[0]
        assert (products == 4).all()
        products[31, 16] = 1971716868
        return types.SimpleNamespace(run=lambda *_: [products])

    monkeypatch.setattr(onnxruntime, "InferenceSession", made)
    model_session._loses_products.cache_clear()
    yield
    model_session._loses_products.cache_clear()


@pytest.mark.usefixtures("without_products")
def test_quantized_graphs_are_refused_where_integer_products_are_wrong(bundle, quantized):
    onnxruntime_only = SessionSettings(kernels="onnxruntime")
    with pytest.raises(ProviderError, match=r"\.onnx: onnxruntime .* multiplies integers wrongly.*: install"):
        quantized("int8").load(onnxruntime_only)
    assert bundle.load(onnxruntime_only)
    if native.choose_kernels("auto", [native.CPU]).native:
        assert quantized("int8").load(SessionSettings(kernels="native"))


def test_this_onnxruntime_multiplies_integers_correctly():
    assert not model_session._loses_products()


def test_openvino_gets_graphs_without_functions_if_it_refuses_them(bundle, model, monkeypatch):
    """OpenVINO refuses a decoder with calls, and cannot run an encoder without them."""
    provider, make, loaded = "OpenVINOExecutionProvider", onnxruntime.InferenceSession, []

    def made(graph, *args, providers, **options):
        found = make(graph, *args, **options | {"providers": ["CPUExecutionProvider"], "provider_options": None})
        if providers == [provider] and {each.name for each in onnx.load_from_string(graph).functions} >= {"Attention"}:
            raise Fail("OpenVINO does not support the following ONNX operations: u2moe.Attention")
        if providers == [provider]:
            loaded.append(graph)
            found.get_providers = lambda: [provider]
        return found

    available = [*onnxruntime.get_available_providers(), provider]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", made)
    found = bundle.load(SessionSettings(providers=[provider]))
    assert [len(onnx.load_from_string(graph).functions) > 0 for graph in loaded] == [True, True, False]
    output = np.ones((9, 64), np.float32)
    for one, other in zip(found.rescore(output, [[5, 6]]), model.rescore(output, [[5, 6]]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_providers_are_told_and_session_options_of_the_caller_used(model, bundle):
    assert model.providers == ("CPUExecutionProvider",)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    assert SessionSettings(sess_options=options).session_options() is options
    bundle.load(SessionSettings(sess_options=options))
    assert SessionSettings(num_threads=2).session_options().intra_op_num_threads == 2
    assert SessionSettings().session_options().intra_op_num_threads == 1
    assert not SessionSettings().session_options().enable_mem_reuse


@pytest.mark.parametrize(("settings", "message"), [
    *(({"providers": each}, "providers must be a sequence of names, got") for each in ("CPU", 0.5, [1], {"CPU"})),
    *(({"provider_options": each}, "must be a sequence of mappings, one for each provider, got")
      for each in ({"a": 1}, 0.5, [1], {"CPU"})),
    ({"providers": ()}, "at least one provider"),
    ({"provider_options": ({}, {})}, "an entry for each of 1 providers, got 2"),
    ({"provider_options": ({"use_arena": "0"},)}, "CPUExecutionProvider takes no options, got 'use_arena'"),
    ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
    ({"num_threads": "2"}, "num_threads must be an integer, got '2'"),
    ({"num_threads": True}, "num_threads must be an integer, got True"),
    ({"sess_options": 0.5}, "sess_options must be onnxruntime.SessionOptions or None, got 0.5"),
    ({"num_threads": 100_000}, r"num_threads must be at most \d+, got 100000"),
    ({"num_threads": 1, "sess_options": onnxruntime.SessionOptions()}, "cannot be combined"),
])  # fmt: skip
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SessionSettings(**settings)


def test_provider_options_reach_the_provider(bundle, monkeypatch):
    providers, options = ("AzureExecutionProvider", "CPUExecutionProvider"), [{"device_id": "1"}, {}]
    if providers[0] not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {providers[0]}")  # if it is built in, it always starts
    create, handed = onnxruntime.InferenceSession, []

    def made(*args, **settings):
        handed.append(settings["provider_options"])  # providers without a device do not report them
        return create(*args, **settings)

    monkeypatch.setattr(onnxruntime, "InferenceSession", made)
    bundle.load(SessionSettings(providers=providers, provider_options=options))
    assert handed == [options] * 3


@pytest.mark.parametrize(("kernels", "reason"), [
    ("onnxruntime", "onnxruntime refuses it"),
    ("auto", "onnxruntime refuses it|is not a graph"),  # native kernels read a graph before onnxruntime loads it
])  # fmt: skip
def test_files_that_are_no_graph_and_names_that_are_no_text_print_nothing(bundle, tmp_path, kernels, reason, capfd):
    """Found by the fuzzer: onnxruntime's Python code printed an error and tried again, or failed for metadata."""
    content, file = (bundle.path / "ctc.onnx").read_bytes(), tmp_path / "ctc.onnx"
    with pytest.raises(BundleError, match="missing"):
        session(bundle, file=file)
    for changed, expected in (
        (b"no graph", reason),
        (content.replace(b"LogSoftmax", b"LogSoftm\xf7x"), reason),
        (content.replace(b"u2moe.version", b"u2m\xf7e.version"), "contains a name that is not valid text"),
    ):
        assert changed != content
        file.write_bytes(changed)
        with pytest.raises(BundleError, match=rf"ctc\.onnx: ({expected})"):
            session(bundle, settings=SessionSettings(kernels=kernels), file=file)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("change", "message"), [
    ({"name": "logits"}, r"outputs are \['log_probs'\], expected \['logits'\]"),
    ({"dtype": "int64"}, r"output log_probs: type is tensor\(float\), expected tensor\(int64\)"),
    ({"axes": ("batch", "vocab_size")}, "expected 2 axes"),
    ({"axes": ("batch", "time", "output_size")}, "axis output_size is 60, expected 64"),
    ({"axes": ("batch", "time", "anything")}, "axis anything is 60, expected a dynamic size"),
])  # fmt: skip
def test_graph_that_differs_from_its_contract(bundle, change, message):
    graph = contract.ctc()
    changed = dataclasses.replace(graph, outputs=(dataclasses.replace(graph.outputs[0], **change),))
    with pytest.raises(BundleError, match=message):
        session(bundle, graph=changed)
