"""The runners of examples/npu with the calls of each vendor's package; onnxruntime computes in place of the device."""

import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile

from u2moe.export import convert_static
from u2moe.runtime import Recognizer

EXAMPLES = Path(__file__).parent.parent / "examples" / "npu"


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory):
    return convert_static(bundle.path, tmp_path_factory.mktemp("npu") / "static", num_left_chunks=2).path


@pytest.fixture
def device(folder):
    """A vendor's runtime: from arrays in the order of the inputs to those of the outputs."""
    session = onnxruntime.InferenceSession(folder / "static.onnx")
    names = [each.name for each in session.get_inputs()]
    return types.SimpleNamespace(
        session=session, run=lambda arrays: session.run(None, dict(zip(names, arrays, strict=True))), names=names
    )


def rockchip(folder, device, monkeypatch):
    class RKNNLite:
        def load_rknn(self, path):
            return 0 if path == str(folder / "static.rknn") else -1

        def init_runtime(self):
            return 0

        def inference(self, inputs, data_format):
            assert data_format == ["nchw"] * len(device.names)
            return device.run(inputs)

    np.save(folder / "mean.npy", np.float32(0))
    monkeypatch.setitem(sys.modules, "rknnlite", types.ModuleType("rknnlite"))
    module = types.ModuleType("rknnlite.api")
    module.RKNNLite = RKNNLite
    monkeypatch.setitem(sys.modules, "rknnlite.api", module)


def litert(folder, device, monkeypatch):
    class Interpreter:
        def __init__(self, path):
            assert path == str(folder / "static.tflite")
            self.tensors = {}

        def allocate_tensors(self):
            pass

        def get_input_details(self):
            return [{"name": f"serving_default_{name}:0", "index": i} for i, name in enumerate(device.names)][::-1]

        def get_output_details(self):
            return [{"name": f"Identity_{i}", "index": 10 + i} for i in (2, 0, 3, 1)]

        def set_tensor(self, index, array):
            self.tensors[index] = array

        def invoke(self):
            found = device.run([self.tensors[index] for index in range(len(device.names))])
            self.tensors |= {10 + index: array for index, array in enumerate(found)}

        def get_tensor(self, index):
            return self.tensors[index]

    module = types.ModuleType("ai_edge_litert.interpreter")
    module.Interpreter = Interpreter
    monkeypatch.setitem(sys.modules, "ai_edge_litert", types.ModuleType("ai_edge_litert"))
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", module)


def qualcomm(folder, device, monkeypatch, tmp_path):
    """The provider's library registers devices; a session may then have no fallback."""
    (tmp_path / "libonnxruntime_providers_qnn.so").touch()
    (tmp_path / "libQnnHtp.so").touch()
    module = types.ModuleType("onnxruntime_qnn")
    module.__file__ = str(tmp_path / "__init__.py")
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", module)
    devices, plain = [], onnxruntime.InferenceSession

    class SessionOptions:
        def __init__(self):
            self.entries = {}

        def add_session_config_entry(self, key, value):
            self.entries[key] = value

        def add_provider_for_devices(self, chosen, options):
            assert [each.ep_name for each in chosen] == ["QNNExecutionProvider"]
            assert options["backend_path"] == str(tmp_path / "libQnnHtp.so")

    def session(graph, options):
        assert options.entries["session.disable_cpu_ep_fallback"] == "1"
        return plain(graph)

    def register(name, path):
        assert path == str(tmp_path / "libonnxruntime_providers_qnn.so")
        devices.append(types.SimpleNamespace(ep_name=name))

    return types.SimpleNamespace(
        SessionOptions=SessionOptions, InferenceSession=session, get_ep_devices=lambda: devices,
        register_execution_provider_library=register,
    )  # fmt: skip


@pytest.mark.parametrize("vendor", ["rockchip", "litert", "qualcomm"])
def test_runners(folder, device, sound, vendor, monkeypatch, tmp_path, capsys):
    """A command prints the same text as the CPU."""
    soundfile.write(tmp_path / "talk.wav", sound, 16_000)
    expected = Recognizer.from_pretrained(folder).transcribe(tmp_path / "talk.wav").text
    assert expected
    example = runpy.run_path(str(EXAMPLES / f"{vendor}.py"))
    if vendor == "qualcomm":
        example["QualcommRunner"].__init__.__globals__["onnxruntime"] = qualcomm(folder, device, monkeypatch, tmp_path)
    else:
        {"rockchip": rockchip, "litert": litert}[vendor](folder, device, monkeypatch)
    example["main"]("run", str(folder), str(tmp_path / "talk.wav"))
    assert capsys.readouterr().out == expected + "\n"


EXAMPLE = """
import onnxruntime

class Runner:
    on_cpu = ["Min"]

    def __init__(self, folder, kind):
        self.session = onnxruntime.InferenceSession(f"{folder}/{kind}.onnx")

    def run(self, inputs):
        names = [each.name for each in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, inputs)))

simulated = Runner
"""


def test_a_runner_in_another_process(folder, sound, tmp_path):
    """It returns the same outputs as in this process; if it exits, its last words are in the error."""
    (tmp_path / "example.py").write_text(EXAMPLE)
    remote = runpy.run_path(str(EXAMPLES / "remote.py"))["RemoteRunner"]
    runner = remote(sys.executable, tmp_path / "example.py", folder, "static")
    assert runner.on_cpu == ["Min"]
    expected = Recognizer.from_pretrained(folder).transcribe(sound, 16_000).text
    assert Recognizer.load(folder, runner=runner).transcribe(sound, 16_000).text == expected
    with pytest.raises(OSError, match=r"the runner exited with status 1: .*Required inputs"):
        runner.run({})
    runner.close()
    with pytest.raises(OSError, match=r"the runner exited with status 1: .*none\.onnx"):
        remote(sys.executable, tmp_path / "example.py", folder, "none")


def test_calibration_of_rockchip(bundle, clips, tmp_path, monkeypatch):
    """The compiler runs in the folder of dataset.txt, so that it finds the listed files."""
    files = sorted(clips.glob("*.wav"))
    written = convert_static(bundle.path, tmp_path / "calibrated", num_left_chunks=2, recordings=files).path
    calls = []

    class RKNN:
        def config(self, target_platform):
            calls.append(target_platform)

        def load_onnx(self, model):
            return 0 if Path(model).is_file() else -1

        def build(self, do_quantization, dataset):
            rows = [line.split() for line in Path(dataset).read_text().splitlines()]
            calls.append([np.load(name).shape for name in rows[0]])
            return 0 if do_quantization else -1

        def export_rknn(self, path):
            Path(path).touch()
            return 0

    module = types.ModuleType("rknn.api")
    module.RKNN = RKNN
    monkeypatch.setitem(sys.modules, "rknn", types.ModuleType("rknn"))
    monkeypatch.setitem(sys.modules, "rknn.api", module)
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLES / "rockchip.py"))
    assert example["compile_graph"]("calibrated", "rk3588", quantize=True) == 0
    stated = json.loads((written / "static.json").read_text())
    assert calls == ["rk3588", [tuple(each["shape"]) for each in stated["inputs"]]]
    assert (written / "static.rknn").exists()
    assert np.load(written / "mean.npy") == 0


def test_centred_features_of_rockchip(folder, sound):
    """In float16, the runner instead of the graph subtracts the mean of the features."""
    example = runpy.run_path(str(EXAMPLES / "rockchip.py"))
    session = onnxruntime.InferenceSession(example["centred"](folder))
    assert not any("cmvn/Sub" in node.name for node in onnx.load(folder / "static_centred.onnx").graph.node)
    names = [each.name for each in session.get_inputs()]

    def inference(inputs, data_format):
        return session.run(None, dict(zip(names, inputs, strict=True)))

    board = types.SimpleNamespace(init_runtime=lambda: 0, inference=inference)
    runner = example["RockchipRunner"](str(folder), simulated=board)
    assert np.ptp(runner.mean) > 0
    expected = Recognizer.from_pretrained(folder).transcribe(sound, 16_000).text
    assert Recognizer.load(folder, runner=runner).transcribe(sound, 16_000).text == expected
