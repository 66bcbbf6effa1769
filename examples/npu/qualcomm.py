"""Run a bundle of fixed shape on a Qualcomm Hexagon NPU, or in the simulator of the package onnxruntime-qnn.

python qualcomm.py compile FOLDER [qdq]             # writes static_ctx.onnx and its context binary
python qualcomm.py run FOLDER recording.wav
"""

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

Array = npt.NDArray[np.float32]
HTP = {"htp_arch": "75", "soc_model": "57", "vtcm_mb": "8", "enable_htp_fp16_precision": "1"}
"""Options for the Snapdragon 8 Gen 3. Other chips need the values of Qualcomm's table: the X Elite, for example, has
`htp_arch` 73 and `soc_model` 60."""


class QualcommRunner:
    """Runner of static_ctx.onnx if the graph has been compiled, otherwise of static.onnx."""

    def __init__(self, folder: str, graph: Path | None = None, context: Path | None = None) -> None:
        import onnxruntime_qnn

        place = Path(onnxruntime_qnn.__file__).parent
        if "QNNExecutionProvider" not in {each.ep_name for each in onnxruntime.get_ep_devices()}:
            library = next(place.glob("*onnxruntime_providers_qnn.*"))
            onnxruntime.register_execution_provider_library("QNNExecutionProvider", str(library))
        devices = [each for each in onnxruntime.get_ep_devices() if each.ep_name == "QNNExecutionProvider"]
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # no silent use of the CPU
        if context is not None:
            options.add_session_config_entry("ep.context_enable", "1")
            options.add_session_config_entry("ep.context_file_path", str(context))
            options.add_session_config_entry("ep.context_embed_mode", "0")
        backend = next(place.glob("*QnnHtp.*"))
        options.add_provider_for_devices(devices[:1], {"backend_path": str(backend), **HTP})
        compiled = Path(folder, "static_ctx.onnx")
        graph = graph or (compiled if compiled.exists() else Path(folder, "static.onnx"))
        self.session = onnxruntime.InferenceSession(graph, options)
        self.outputs = [each.name for each in self.session.get_outputs()]

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run the graph on inputs by name, and return outputs by name."""
        return dict(zip(self.outputs, self.session.run(self.outputs, inputs), strict=True))


def simulated(folder: str, *options: str) -> QualcommRunner:
    """Return a runner for the context binary in the HTP simulator. An operator left to the CPU is an error."""
    if not Path(folder, "static_ctx.onnx").exists():
        main("compile", folder, *options)
    return QualcommRunner(folder)


def main(command: str, folder: str, *rest: str) -> None:
    """Compile a bundle, or recognise a recording and print its text."""
    if command == "compile":
        graph = Path(folder, "static_qdq.onnx" if "qdq" in rest else "static.onnx")
        QualcommRunner(folder, graph, context=Path(folder, "static_ctx.onnx"))
        return
    import soundfile

    from u2moe import Recognizer

    audio = soundfile.read(
        rest[0], dtype="float32", always_2d=False
    )  # before the simulator is loaded, since its libraries disturb others
    print(Recognizer.load(folder, runner=QualcommRunner(folder)).transcribe(*audio).text)


if __name__ == "__main__":
    main(*sys.argv[1:])
