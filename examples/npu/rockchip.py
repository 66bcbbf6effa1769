"""Run a bundle of fixed shape on the NPU of a Rockchip board. Compile on a PC. Recognise on the PC or the board.

python rockchip.py compile FOLDER rk3588 [int8]     # needs rknn-toolkit2
python rockchip.py run FOLDER recording.wav         # needs u2moe, and rknn-toolkit-lite2 on the board
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def centred(place: Path) -> Path:
    """Move the subtraction of the features' mean from the graph to the runner; return the file of the new graph.

    The NPU reads features in float16, which has steps of 0.008 at log energies of 13, and finer ones near 0.
    """
    import onnx

    model, target, mean = onnx.load(place / "static.onnx"), place / "static_centred.onnx", np.zeros(1, np.float32)
    first = next(node for node in model.graph.node if "chunk" in node.input)
    if first.op_type == "Sub":
        mean = onnx.numpy_helper.to_array(next(own for own in model.graph.initializer if own.name == first.input[1]))
        model.graph.node.remove(first)
        for node in model.graph.node:
            node.input[:] = ["chunk" if name == first.output[0] else name for name in node.input]
    onnx.save(model, target)
    np.save(place / "mean.npy", mean)
    return target


def built(folder: str, platform: str, *, quantize: bool = False, verbose: bool = False) -> Any:
    """Return the compiled graph, in float16 or in int8. int8 is calibrated on the recordings of `--calibration`."""
    from rknn.api import RKNN

    rknn, place = RKNN(verbose=True) if verbose else RKNN(), Path(folder).absolute()
    rknn.config(target_platform=platform)
    done = rknn.load_onnx(model=str(place / "static.onnx" if quantize else centred(place)))
    if quantize:
        np.save(place / "mean.npy", np.float32(0))
        os.chdir(place / "calibration")  # dataset.txt lists files relative to this folder
    if done or rknn.build(do_quantization=quantize, dataset="dataset.txt" if quantize else None):
        raise OSError("rknn-toolkit2 cannot build the graph")
    return rknn


def compile_graph(folder: str, platform: str, *, quantize: bool = False) -> int:
    """Write static.rknn and mean.npy."""
    place = Path(folder).absolute() / "static.rknn"
    return built(folder, platform, quantize=quantize).export_rknn(str(place))


class RockchipRunner:
    """Runner of the compiled graph. With the RKNN that built the graph as `simulated`, it runs in the PC simulator."""

    def __init__(self, folder: str, simulated: Any = None) -> None:
        stated = json.loads(Path(folder, "static.json").read_text())
        self.outputs = {each["name"]: each["shape"] for each in stated["outputs"]}
        self.mean = np.load(Path(folder, "mean.npy"))
        self.rknn = simulated
        self.on_cpu: list[str] = []
        if simulated is None:
            from rknnlite.api import RKNNLite

            self.rknn = RKNNLite()
            if self.rknn.load_rknn(str(Path(folder, "static.rknn"))) != 0:
                raise OSError(f"{folder}/static.rknn cannot be loaded")
        if self.rknn.init_runtime() != 0:
            raise OSError("the NPU runtime cannot be started")

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run the graph on inputs by name, and return outputs by name."""
        arrays = [array - self.mean if name == "chunk" else array for name, array in inputs.items()]
        found = self.rknn.inference(inputs=arrays, data_format=["nchw"] * len(arrays))
        pairs = zip(self.outputs.items(), found, strict=True)
        return {name: np.asarray(value, np.float32).reshape(shape) for (name, shape), value in pairs}


def left_to_cpu(log: str) -> list[str]:
    """Return the operators that the compiler's table assigns to the CPU."""
    return sorted(set(re.findall(r" (\w+) +(?:FLOAT16|INT8) +CPU ", log)) - {"InputOperator", "OutputOperator"})


def simulated(folder: str, platform: str, *options: str) -> RockchipRunner:
    """Return a runner in the PC simulator. It lists the operators that the compiler leaves to the CPU."""
    place = Path(folder).absolute()
    log, kept = place / "build.log", (os.dup(1), os.dup(2))
    with log.open("wb") as file:  # the compiler writes its table directly to descriptors
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        runner = RockchipRunner(str(place), built(folder, platform, quantize="int8" in options, verbose=True))
    for number, old in zip((1, 2), kept, strict=True):
        os.dup2(old, number)
    runner.on_cpu = left_to_cpu(log.read_text(errors="replace"))
    return runner


def main(command: str, folder: str, *rest: str) -> None:
    """Compile a bundle, or recognise a recording and print its text."""
    if command == "compile":
        sys.exit(compile_graph(folder, rest[0], quantize="int8" in rest[1:]))
    from u2moe import Recognizer

    print(Recognizer.load(folder, runner=RockchipRunner(folder)).transcribe(rest[0]).text)


if __name__ == "__main__":
    main(*sys.argv[1:])
