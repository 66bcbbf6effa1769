"""Choice of kernels. Another package replaces u2moe-kernels, which may or may not be installed."""

import sys
import types

import numpy as np
import onnxruntime
import pytest

from u2moe.runtime import Bundle, KernelsError, Recognizer
from u2moe.runtime.bundle.functions import KERNELS_CONTRACT
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.cli import main
from u2moe.runtime.installation import install_command
from u2moe.runtime.model import native
from u2moe.runtime.model.native import Kernels, checked_kernels, choose_kernels
from u2moe.runtime.model.settings import SessionSettings

CPU = ("CPUExecutionProvider",)


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

    def install(contract=KERNELS_CONTRACT, library=b"no library"):
        file = tmp_path / "library.so"
        file.write_bytes(library)
        package = types.ModuleType("u2moe_kernels")
        package.__version__ = "9.8.7"
        package.library_path = lambda: file
        package.description = lambda: {"isa": "abacus", "operators": ["Int8MatMul"], "contract": contract, "layout": 1}
        monkeypatch.setitem(sys.modules, "u2moe_kernels", package)
        return file

    return install


@pytest.fixture
def registered(installed, monkeypatch):
    """Install a library that onnxruntime accepts. Returns the registered files."""
    installed()
    files = []
    monkeypatch.setattr(
        onnxruntime.SessionOptions, "register_custom_ops_library", lambda _, file: files.append(file), raising=False
    )
    native.installed_kernels()
    files.clear()
    return files


def test_without_the_package_auto_is_onnxruntime_unless_a_fault_is_inside_it(missing, monkeypatch, tmp_path):
    found = choose_kernels("auto", CPU)
    assert not found.native
    assert str(found) == (
        f"onnxruntime {onnxruntime.__version__} (native kernels are not installed: {install_command('kernels')})"
    )
    with pytest.raises(KernelsError, match=r"pip install \./runtime/kernels"):
        choose_kernels("native", CPU)
    with pytest.raises(KernelsError, match=r"pip install \./runtime/kernels"):
        Recognizer.from_pretrained(kernels="native")
    (tmp_path / "u2moe_kernels.py").write_text("import nothing_of_this_name", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "u2moe_kernels", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KernelsError, match="u2moe-kernels cannot be loaded: No module named 'nothing_of_this_name'"):
        choose_kernels("native", CPU)


@pytest.mark.parametrize(("contract", "message"), [
    (KERNELS_CONTRACT - 1, r"9\.8\.7 is too old: .* pip install \./runtime/kernels"),
    (None, r"9\.8\.7 is too old"),
    (KERNELS_CONTRACT + 1, r"9\.8\.7 is too new: .* contract \d+, but this version of u2moe needs \d+: pip install"),
])  # fmt: skip
def test_a_library_of_another_contract_is_refused(installed, contract, message):
    installed(contract=contract)
    with pytest.raises(KernelsError, match=message):
        choose_kernels("native", CPU)
    assert not choose_kernels("auto", CPU).native


def test_a_library_that_cannot_be_loaded_is_refused_by_name_and_auto_goes_without(installed):
    installed()
    with pytest.raises(KernelsError, match=r"u2moe-kernels 9\.8\.7 cannot run with onnxruntime"):
        choose_kernels("native", CPU)
    recognizer = Recognizer.from_pretrained()
    assert not recognizer.model.kernels.native
    assert "cannot run with onnxruntime" in recognizer.model.kernels.reason


def test_other_providers_than_the_cpu_have_no_native_kernels(registered):
    providers = ("CUDAExecutionProvider", *CPU)
    with pytest.raises(KernelsError, match="run only on the CPU, not on CUDAExecutionProvider, CPUExecution"):
        choose_kernels("native", providers)
    assert not choose_kernels("auto", providers).native


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


class Refusing:
    """An onnxruntime session with a library that refuses every graph."""

    def __init__(self, real, registered):
        self.real = real
        self.registered = registered

    def __call__(self, *arguments, **named):
        if self.registered:
            self.registered.clear()
            raise RuntimeError("attribute activation: 'cube' is unknown")
        return self.real(*arguments, **named)


def test_a_library_with_another_operator_or_a_refused_graph_changes_nothing(registered, quantized, monkeypatch):
    bundle = quantized("int8")
    features = np.random.default_rng(0).normal(10, 3, (60, bundle.manifest.model.feature_size)).astype(np.float32)
    one, other = (
        bundle.load(SessionSettings(kernels=kernels)).encode(features) for kernels in ("native", "onnxruntime")
    )
    np.testing.assert_array_equal(one, other)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Refusing(onnxruntime.InferenceSession, registered))
    bundle = quantized("int8")
    found = bundle.load().kernels
    assert not found.native
    assert found.reason.startswith("u2moe-kernels 9.8.7 cannot run encoder.onnx: ")
    assert "'cube' is unknown" in found.reason
    with pytest.raises(KernelsError, match=r"encoder\.onnx: .*'cube' is unknown"):
        bundle.load(SessionSettings(kernels="native"))


@pytest.mark.slow
def test_kernels_as_data_and_on_the_command_line(missing, capsys, monkeypatch):
    data = Kernels(native=False, reason="as requested").data()
    assert data["operators"] == []
    assert data["library"] is None
    assert Bundle.open(DEMO_FOLDER).load(SessionSettings(kernels="onnxruntime")).kernels == Kernels(
        native=False, reason="as requested"
    )
    clip = str(next((DEMO_FOLDER / "clips").glob("*.wav"), next((DEMO_FOLDER / "clips").glob("*.flac"))))
    monkeypatch.setenv("U2MOE_KERNELS", "native")
    assert main(["transcribe", clip]) == 1
    assert "pip install ./runtime/kernels" in capsys.readouterr().err
    monkeypatch.setenv("U2MOE_KERNELS", "onnxruntime")
    assert main(["transcribe", clip]) == 0
