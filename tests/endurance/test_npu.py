"""Graphs of fixed shape in the simulator of Qualcomm's HTP, which onnxruntime-qnn has for Linux on x86-64."""

import json
import runpy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from u2moe.export import convert_static

pytestmark = pytest.mark.endurance
EXAMPLE = Path(__file__).parents[2] / "examples" / "npu" / "qualcomm.py"


@pytest.mark.parametrize("network", ["moe_tiny", "dense_tiny"])
def test_simulator_of_qualcomm(network, exported, clips, tmp_path):
    """Context binaries are made and loaded without CPU fallback, and have the best tokens of the float graph."""
    pytest.importorskip("onnxruntime_qnn", reason="needs Linux on x86-64, and pip install onnxruntime-qnn")
    files = sorted(clips.glob("*.wav"))
    folder = convert_static(exported(network), tmp_path / "static", recordings=files, qdq=True).path
    names = [each["name"] for each in json.loads((folder / "static.json").read_text())["inputs"]]
    samples = [{name: np.load(folder / "calibration" / f"{row}_{name}.npy") for name in names} for row in range(8)]
    plain = onnxruntime.InferenceSession(folder / "static.onnx")
    expected = [plain.run(["log_probs"], sample)[0].argmax(-1) for sample in samples]
    example = runpy.run_path(str(EXAMPLE))
    for compiled, least in ((), 0.98), (("qdq",), 0.9):
        example["main"]("compile", str(folder), *compiled)
        assert (folder / "static_ctx_qnn.bin").stat().st_size > 100_000
        runner = example["QualcommRunner"](folder)
        found = [runner.run(sample)["log_probs"].argmax(-1) for sample in samples]
        assert np.mean([one == other for one, other in zip(expected, found, strict=True)]) >= least
        for file in folder.glob("static_ctx*"):
            file.unlink()
