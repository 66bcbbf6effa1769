"""Run a bundle of fixed shape with LiteRT (TensorFlow Lite) on a phone: on its CPU or, with a delegate, GPU or NPU.

python litert.py compile FOLDER [int8]              # needs onnx2tf; writes static.tflite
python litert.py run FOLDER recording.wav           # needs u2moe and ai-edge-litert
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def compile_graph(folder: str, *, quantize: bool = False) -> None:
    """Write static.tflite, in float32 or calibrated to int8. Its inputs are those of static.onnx."""
    stated = json.loads(Path(folder, "static.json").read_text())
    names = [each["name"] for each in stated["inputs"]]
    with tempfile.TemporaryDirectory() as target:
        graph = shutil.copy(Path(folder, "static.onnx"), target)  # onnx2tf overwrites its input
        command = [sys.executable, "-m", "onnx2tf", "-i", graph, "-o", target, "-kat", *names, "-coion", "-n"]
        if quantize:
            command.append("-oiqt")
            for name in names:
                command += ["-cind", name, str(Path(folder, "calibration", f"{name}.npy")), "[0.0]", "[1.0]"]
        subprocess.run(command, check=True)
        kind = "integer_quant" if quantize else "float32"
        shutil.copy(Path(target, f"static_{kind}.tflite"), Path(folder, "static.tflite"))


class LiteRtRunner:
    """Runner of static.tflite."""

    def __init__(self, folder: str) -> None:
        from ai_edge_litert.interpreter import Interpreter

        stated = json.loads(Path(folder, "static.json").read_text())
        self.interpreter = Interpreter(str(Path(folder, "static.tflite")))
        self.interpreter.allocate_tensors()
        # inputs keep their names ("serving_default_chunk:0"); outputs lose theirs, and are found by shape
        self.inputs = {each["name"]: each["index"] for each in self.interpreter.get_input_details()}
        self.outputs = {each["name"]: tuple(each["shape"]) for each in stated["outputs"]}

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run the graph on inputs by name, and return outputs by name."""
        for name, array in inputs.items():
            (index,) = (
                index
                for found, index in self.inputs.items()
                if found.split(":")[0].endswith(f"_{name}") or found == name
            )
            self.interpreter.set_tensor(index, array)
        self.interpreter.invoke()
        found = [self.interpreter.get_tensor(each["index"]) for each in self.interpreter.get_output_details()]
        return {
            name: next(value for value in found if value.shape == shape).astype(np.float32)
            for name, shape in self.outputs.items()
        }


def simulated(folder: str, *options: str) -> LiteRtRunner:
    """Return a runner on this machine. Compile the graph if needed."""
    if not Path(folder, "static.tflite").exists():
        compile_graph(folder, quantize="int8" in options)
    return LiteRtRunner(folder)


def main(command: str, folder: str, *rest: str) -> None:
    """Compile a bundle, or recognise a recording and print its text."""
    if command == "compile":
        compile_graph(folder, quantize="int8" in rest)
        return
    from u2moe import Recognizer

    print(Recognizer.load(folder, runner=LiteRtRunner(folder)).transcribe(rest[0]).text)


if __name__ == "__main__":
    main(*sys.argv[1:])
