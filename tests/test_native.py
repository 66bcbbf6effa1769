"""Choice of kernels, where another package may replace u2moe-kernels, and sessions with them."""

import importlib.util
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from layers import packed_layer_model, session_with
from manifests import with_activation

from u2moe.benchmarks.instruments.workload import speech
from u2moe.quantize.inspection import describe, inspect_bundle
from u2moe.runtime import Bundle, KernelsError, Recognizer
from u2moe.runtime.audio.files import find_audio
from u2moe.runtime.bundle.functions import KERNELS_CONTRACT
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.cli import main
from u2moe.runtime.decoding.ctc import PrefixBeamSearch
from u2moe.runtime.decoding.native_search import NativeSearch
from u2moe.runtime.graph.activation import ACTIVATIONS
from u2moe.runtime.installation import install_command
from u2moe.runtime.model import native
from u2moe.runtime.model.features import fbank
from u2moe.runtime.model.native import Kernels, checked_kernels, choose_kernels
from u2moe.runtime.model.settings import SessionSettings
from u2moe.runtime.text.word_errors import WordErrors

CPU = ("CPUExecutionProvider",)
INSTALL = r"pip install \./runtime/kernels"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Reset the environment and the cache of installed kernels."""
    monkeypatch.delenv(native.VARIABLE, raising=False)
    native.installed_kernels.cache_clear()
    yield
    native.installed_kernels.cache_clear()


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "u2moe_kernels", None)


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Return a function that replaces u2moe_kernels by a package with an invalid library."""

    def install(contract=KERNELS_CONTRACT):
        (tmp_path / "library.so").write_bytes(b"no library")
        package = types.ModuleType("u2moe_kernels")
        package.__version__ = "9.8.7"
        package.library_path = lambda: tmp_path / "library.so"
        package.description = lambda: {"isa": "abacus", "operators": ["Int8MatMul"], "contract": contract, "layout": 1}
        monkeypatch.setitem(sys.modules, "u2moe_kernels", package)

    return install


@pytest.fixture
def registered(installed, monkeypatch):
    """Install a library that onnxruntime accepts. Returns the registered files."""
    installed()
    files, method = [], "register_custom_ops_library"
    monkeypatch.setattr(onnxruntime.SessionOptions, method, lambda _, file: files.append(file), raising=False)
    native.installed_kernels()
    files.clear()
    return files


def test_without_the_package_auto_is_onnxruntime_unless_a_fault_is_inside_it(missing, monkeypatch, tmp_path):
    found = choose_kernels("auto", CPU)
    assert not found.native
    reason = f"native kernels are not installed: {install_command('kernels')}"
    assert str(found) == f"onnxruntime {onnxruntime.__version__} ({reason})"
    with pytest.raises(KernelsError, match=INSTALL):
        Recognizer.from_pretrained(kernels="native")
    (tmp_path / "u2moe_kernels.py").write_text("import nothing_of_this_name", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "u2moe_kernels", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KernelsError, match="u2moe-kernels cannot be loaded: No module named 'nothing_of_this_name'"):
        choose_kernels("native", CPU)


@pytest.mark.parametrize(("contract", "message"), [
    (KERNELS_CONTRACT - 1, rf"9\.8\.7 is too old: .* {INSTALL}"),
    (None, r"9\.8\.7 is too old"),
    (KERNELS_CONTRACT + 1, r"9\.8\.7 is too new: .* contract \d+, but this version of u2moe needs \d+: pip install"),
    (KERNELS_CONTRACT, r"u2moe-kernels 9\.8\.7 cannot run with onnxruntime"),
])  # fmt: skip
def test_a_library_that_does_not_fit_is_refused_by_name_and_auto_goes_without(installed, contract, message):
    installed(contract)
    with pytest.raises(KernelsError, match=message) as refused:
        choose_kernels("native", CPU)
    assert choose_kernels("auto", CPU) == Kernels(native=False, reason=str(refused.value))


def test_options_of_the_caller_stay_but_have_the_library_unless_it_is_not_wanted(registered, monkeypatch):
    options = onnxruntime.SessionOptions()
    assert SessionSettings(sess_options=options).session_options() is options
    assert registered == []
    with pytest.raises(ValueError, match=r"cannot be combined: .*register_custom_ops_library"):
        SessionSettings(sess_options=options, kernels="native")
    SessionSettings(kernels="onnxruntime").session_options()
    assert registered == []
    for settings in (SessionSettings(), SessionSettings(kernels="native")):
        settings.session_options()
        assert settings.chosen.native
    assert len(registered) == 2
    monkeypatch.setenv(native.VARIABLE, "onnxruntime")
    assert not SessionSettings().chosen.native
    providers = ("CUDAExecutionProvider", *CPU)
    with pytest.raises(KernelsError, match="run only on the CPU, not on CUDAExecutionProvider, CPUExecution"):
        choose_kernels("native", providers)
    assert not choose_kernels("auto", providers).native


def test_the_default_comes_from_the_environment(monkeypatch):
    assert checked_kernels(None) == "auto"
    monkeypatch.setenv(native.VARIABLE, "onnxruntime")
    assert checked_kernels(None) == "onnxruntime"
    assert checked_kernels("native") == "native"
    monkeypatch.setenv(native.VARIABLE, "abacus")
    with pytest.raises(ValueError, match="U2MOE_KERNELS must be one of auto, native, onnxruntime, got 'abacus'"):
        SessionSettings()
    with pytest.raises(ValueError, match="kernels must be one of"):
        SessionSettings(kernels="abacus")


def test_a_library_with_another_operator_or_a_refused_graph_changes_nothing(registered, quantized, monkeypatch):
    bundle = quantized("int8")
    features = np.random.default_rng(0).normal(10, 3, (60, bundle.manifest.model.feature_size)).astype(np.float32)
    settings = [SessionSettings(kernels=kernels) for kernels in ("native", "onnxruntime")]
    np.testing.assert_array_equal(*(bundle.load(each).encode(features) for each in settings))
    real = onnxruntime.InferenceSession

    def refusing(*arguments, **named):
        """Refuse every graph with the library."""
        if registered:
            registered.clear()
            raise RuntimeError("attribute activation: 'cube' is unknown")
        return real(*arguments, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", refusing)
    found = bundle.load().kernels
    assert not found.native
    assert found.reason.startswith("u2moe-kernels 9.8.7 cannot run encoder.onnx: ")
    assert "'cube' is unknown" in found.reason
    with pytest.raises(KernelsError, match=r"encoder\.onnx: .*'cube' is unknown"):
        bundle.load(SessionSettings(kernels="native"))


@pytest.mark.slow
def test_kernels_as_data_and_on_the_command_line(missing, capsys, monkeypatch):
    found = Bundle.open(DEMO_FOLDER).load(SessionSettings(kernels="onnxruntime")).kernels
    assert found == Kernels(native=False, reason="as requested")
    assert (found.data()["operators"], found.data()["library"]) == ([], None)
    clip = str(next((DEMO_FOLDER / "clips").glob("*.flac")))
    monkeypatch.setenv("U2MOE_KERNELS", "native")
    assert main(["transcribe", clip]) == 1
    assert "pip install ./runtime/kernels" in capsys.readouterr().err
    monkeypatch.setenv("U2MOE_KERNELS", "onnxruntime")
    assert main(["transcribe", clip]) == 0


# ---- the real kernels ----

needs_kernels = pytest.mark.skipif(importlib.util.find_spec("u2moe_kernels") is None, reason="needs u2moe-kernels")


@needs_kernels
@pytest.mark.slow
def test_texts_are_about_those_of_onnxruntime_and_streams_leave_no_bit_behind(quantized):
    """Float sums differ in the last bits, so some activations are rounded to another integer."""
    native, alone = (Recognizer.from_pretrained(kernels=kernels) for kernels in ("native", "onnxruntime"))
    assert native.model.kernels.native
    for recognizer, kind in ((native, NativeSearch), (alone, PrefixBeamSearch)):
        assert isinstance(recognizer.create_stream().state.utterance.search, kind)
    errors = WordErrors()
    for clip in find_audio([DEMO_FOLDER / "clips"]):
        errors.add(alone.transcribe(clip).text, native.transcribe(clip).text)
    assert errors.num_words > 10
    assert errors.rate < 0.25
    # Kernels keep projected positions. A model that has encoded with other contexts still equals a new one
    bundle, settings = quantized("int8"), SessionSettings(kernels="native")
    frames = fbank(speech(6.0, 16_000), bundle.manifest.features)
    contexts = [(16, 4), (None, -1), (5, 2), (16, -1), (1, 3)]

    def encoded(model, context):
        return model.encode(frames, chunk_size=context[0], num_left_chunks=context[1])

    expected = [encoded(bundle.load(settings), context) for context in contexts]
    used = bundle.load(settings)
    for context, one in [*zip(contexts, expected, strict=True)] * 2:
        np.testing.assert_array_equal(encoded(used, context), one)


@needs_kernels
def test_a_function_that_the_kernels_cannot_run_leaves_the_others_native(quantized, tmp_path, caplog):
    """An activation of a later version is an example. onnxruntime runs the function's body."""
    bundle = quantized("int8")
    later = with_activation(bundle, "cube", tmp_path / "later")
    with caplog.at_level("INFO", "u2moe"):
        loaded = Recognizer.load(later.path).model
    *others, last = ACTIVATIONS
    reason = f"attribute activation must be {', '.join(others)} or {last}, got 'cube'"
    assert loaded.kernels.native
    assert loaded.kernels.refused == {"Int8MixtureOfExperts of encoder": reason}
    assert str(loaded.kernels).endswith(f"; not native: Int8MixtureOfExperts of encoder ({reason})")
    assert f"kernels: {loaded.kernels}" in caplog.text
    frames = np.random.default_rng(0).normal(10, 3, (60, bundle.manifest.model.feature_size)).astype(np.float32)
    found, expected = (each.encode(frames) for each in (loaded, bundle.load()))
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99
    shown = describe(inspect_bundle(later.path))
    (native,) = re.findall("^  native  (.*)", shown, re.MULTILINE)
    assert "Int8Linear" in native
    assert re.search(rf"^  onnxruntime  \d x Int8MixtureOfExperts: {reason}$", shown, re.MULTILINE)
    with pytest.raises(KernelsError, match=r"encoder\.onnx.*Int8MixtureOfExperts: attribute activation"):
        later.load(SessionSettings(kernels="native"))


def resident(file):
    """Return the resident bytes of a mapped file, or None if it is not mapped."""
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    found = re.findall(rf"{re.escape(str(file))}\nSize:.*?\nRss: +(\d+) kB", text, re.DOTALL)
    return sum(map(int, found)) << 10 if found else None


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_packed_leaves_the_memory_of_the_file(tmp_path):
    """The file may then change, because it is not read again."""
    random = np.random.default_rng(0)
    values = {"weight": random.integers(-127, 128, (1024, 2048), np.int8)}
    values["scale"] = random.uniform(0.5, 1, 2048).astype(np.float32)
    content = packed_layer_model("Int8Linear", ["y"], {"x": np.float32}, values, {"activation": ""})
    external = {"save_as_external_data": True, "location": "one.data"}
    onnx.save_model(onnx.load_from_string(content), tmp_path / "one.onnx", **external)
    session = session_with(tmp_path / "one.onnx", native.installed_kernels().library)
    assert resident(tmp_path / "one.data") == 0
    rows = random.standard_normal((3, 1024), np.float32)
    before = session.run(None, {"x": rows})[0]
    os.truncate(tmp_path / "one.data", 0)
    np.testing.assert_array_equal(session.run(None, {"x": rows})[0], before)
