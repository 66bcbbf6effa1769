"""Run a bundle of fixed shape with OpenVINO, on an Intel CPU, GPU or NPU.

python intel.py FOLDER recording.wav [DEVICE]       # needs u2moe and openvino; DEVICE: CPU, GPU or NPU
"""

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


class OpenVinoRunner:
    """Runner of static.onnx. The graph is compiled for the device on construction."""

    def __init__(self, folder: str, device: str = "CPU") -> None:
        import openvino

        exact = {"INFERENCE_PRECISION_HINT": "f32"} if device == "CPU" else {}  # without this, newer CPUs use bfloat16
        self.model = openvino.compile_model(Path(folder, "static.onnx"), device, exact)

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run the graph on inputs by name, and return outputs by name."""
        return {output.any_name: value for output, value in self.model(inputs).items()}


simulated = OpenVinoRunner


def main(folder: str, recording: str, *device: str) -> None:
    """Recognise a recording and print its text."""
    from u2moe import Recognizer

    print(Recognizer.load(folder, runner=OpenVinoRunner(folder, *device)).transcribe(recording).text)


if __name__ == "__main__":
    main(*sys.argv[1:])
