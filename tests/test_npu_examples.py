"""The runners of examples/npu with the calls of each vendor's package; onnxruntime computes in place of the device."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

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


@pytest.fixture(scope="module")
def expected(folder, sound):
    """Return the text that the CPU recognises."""
    text = Recognizer.from_pretrained(folder).transcribe(sound, 16_000).text
    assert text
    return text


def device(graph):
    """Return a vendor's runtime: the names of the inputs, and a function from their arrays to those of the outputs."""
    session = onnxruntime.InferenceSession(graph)
    names = [each.name for each in session.get_inputs()]
    return names, lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def rockchip(folder, monkeypatch, tmp_path, example):
    names, run = device(folder / "static.onnx")

    def inference(inputs, data_format):
        assert data_format == ["nchw"] * len(names)
        return run(inputs)

    def load(path):
        return 0 if path == str(folder / "static.rknn") else -1

    board = SimpleNamespace(load_rknn=load, init_runtime=lambda: 0, inference=inference)
    np.save(folder / "mean.npy", np.float32(0))
    monkeypatch.setitem(sys.modules, "rknnlite.api", SimpleNamespace(RKNNLite=lambda: board))


def litert(folder, monkeypatch, tmp_path, example):
    names, run = device(folder / "static.onnx")

    class Interpreter(dict):
        def __init__(self, path):
            assert path == str(folder / "static.tflite")

        def allocate_tensors(self):
            pass

        def get_input_details(self):
            return [{"name": f"serving_default_{name}:0", "index": i} for i, name in enumerate(names)][::-1]

        def get_output_details(self):
            return [{"name": f"Identity_{i}", "index": 10 + i} for i in (2, 0, 3, 1)]

        def invoke(self):
            found = run([self[index] for index in range(len(names))])
            self.update({10 + index: array for index, array in enumerate(found)})

        set_tensor, get_tensor = dict.__setitem__, dict.__getitem__

    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", SimpleNamespace(Interpreter=Interpreter))


def qualcomm(folder, monkeypatch, tmp_path, example):
    """The provider's library registers devices; a session may then have no fallback."""
    library, backend = (tmp_path / name for name in ("libonnxruntime_providers_qnn.so", "libQnnHtp.so"))
    for file in (library, backend):
        file.touch()
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", SimpleNamespace(__file__=str(tmp_path / "__init__.py")))
    devices, plain = [], onnxruntime.InferenceSession

    class SessionOptions(dict):
        add_session_config_entry = dict.__setitem__

        def add_provider_for_devices(self, chosen, options):
            assert [each.ep_name for each in chosen] == ["QNNExecutionProvider"]
            assert options["backend_path"] == str(backend)

    def session(graph, options):
        assert options["session.disable_cpu_ep_fallback"] == "1"
        return plain(graph)

    def register(name, path):
        assert path == str(library)
        devices.append(SimpleNamespace(ep_name=name))

    example["onnxruntime"] = SimpleNamespace(
        SessionOptions=SessionOptions,
        InferenceSession=session,
        get_ep_devices=lambda: devices,
        register_execution_provider_library=register,
    )


@pytest.mark.parametrize("vendor", [rockchip, litert, qualcomm])
def test_runners(folder, sound, expected, vendor, monkeypatch, tmp_path, capsys):
    """A command prints the same text as the CPU."""
    soundfile.write(tmp_path / "talk.wav", sound, 16_000, subtype="FLOAT")
    main = runpy.run_path(str(EXAMPLES / f"{vendor.__name__}.py"))["main"]
    vendor(folder, monkeypatch, tmp_path, main.__globals__)
    main("run", str(folder), str(tmp_path / "talk.wav"))
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


def test_a_runner_in_another_process(folder, sound, expected, tmp_path):
    """It returns the same outputs as in this process; if it exits, its last words are in the error."""
    (tmp_path / "example.py").write_text(EXAMPLE)
    remote = runpy.run_path(str(EXAMPLES / "remote.py"))["RemoteRunner"]
    runner = remote(sys.executable, tmp_path / "example.py", folder, "static")
    assert runner.on_cpu == ["Min"]
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

    def build(do_quantization, dataset):
        calls.append([np.load(name).shape for name in Path(dataset).read_text().splitlines()[0].split()])
        return 0 if do_quantization else -1

    compiler = SimpleNamespace(
        config=lambda **chosen: calls.extend(chosen.values()),
        load_onnx=lambda model: 0 if Path(model).is_file() else -1,
        build=build,
        export_rknn=lambda path: Path(path).touch() or 0,
    )
    monkeypatch.setitem(sys.modules, "rknn.api", SimpleNamespace(RKNN=lambda: compiler))
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLES / "rockchip.py"))
    assert example["compile_graph"]("calibrated", "rk3588", quantize=True) == 0
    stated = json.loads((written / "static.json").read_text())
    assert calls == ["rk3588", [tuple(each["shape"]) for each in stated["inputs"]]]
    assert (written / "static.rknn").exists()
    assert np.load(written / "mean.npy") == 0


def test_centred_features_of_rockchip(folder, sound, expected):
    """In float16, the runner instead of the graph subtracts the mean of the features."""
    example = runpy.run_path(str(EXAMPLES / "rockchip.py"))
    _, run = device(example["centred"](folder))
    assert not any("cmvn/Sub" in node.name for node in onnx.load(folder / "static_centred.onnx").graph.node)
    board = SimpleNamespace(init_runtime=lambda: 0, inference=lambda inputs, data_format: run(inputs))
    runner = example["RockchipRunner"](str(folder), simulated=board)
    assert np.ptp(runner.mean) > 0
    assert Recognizer.load(folder, runner=runner).transcribe(sound, 16_000).text == expected
