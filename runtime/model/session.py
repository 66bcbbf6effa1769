"""An onnxruntime session, checked against its contract, with inputs and outputs by name. Stateless and thread-safe."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from u2moe.runtime.bundle.contract import PACKED, Graph, Tensor
from u2moe.runtime.bundle.files import BundleFiles
from u2moe.runtime.bundle.graph_file import GraphFile
from u2moe.runtime.bundle.manifest import Manifest, ModelConfig
from u2moe.runtime.bundle.manifest_file import check_metadata
from u2moe.runtime.bundle.weight_formats import quantized
from u2moe.runtime.errors import BundleError, IntegrityError, KernelsError, ProviderError
from u2moe.runtime.model.calls import NATIVE_CALLS
from u2moe.runtime.model.device import DeviceArray
from u2moe.runtime.model.native import ONNXRUNTIME_ERRORS, Kernels, checked_kernels
from u2moe.runtime.model.settings import DEFAULT_PROVIDER, SessionSettings

OPENVINO = "OpenVINOExecutionProvider"
_OPENVINO_REFUSED = (1, 24)
"""Newest onnxruntime-openvino known to treat the scales of quantized rows as scales of columns. The first chunk then
fails because of mismatched shapes or, on some processors, crashes the process (SIGFPE)."""
_PRODUCT = (  # a graph: c = MatMulInteger(a, b), where b [4, 31] is 1 everywhere
    b'\x08\x07B\x02\x10\r:\xbd\x01\n\x18\n\x01a\n\x01b\x12\x01c"\rMatMulInteger\x12\x01gZ\t\n\x01a\x12\x04\n\x02\x08\x02'
    b"b\t\n\x01c\x12\x04\n\x02\x08\x06*\x87\x01\x08\x04\x08\x1f\x10\x03B\x01bJ|" + bytes([1] * 4 * 31)
)
_ELEMENT_TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)"}


class Session:
    """An onnxruntime session of a graph file with the contract `graph`. Its functions are computed by `kernels`.

    Files may change after the session is created, except for packed weights, and for all weights if the caller provides
    `sess_options`: these cannot be passed to the session in memory. Without `files`, no digests are compared.

    Raises:
        ProviderError: a provider did not start, or computes wrong results here.
        KernelsError: native kernels were requested, but cannot run the graph.
        BundleError: onnxruntime rejects the file, or it differs from `graph` or from the manifest.
        IntegrityError: a file does not match its digest, or was changed while it was loaded.
    """

    def __init__(
        self,
        file: Path,
        graph: Graph,
        manifest: Manifest,
        settings: SessionSettings,
        *,
        files: BundleFiles | None = None,
    ) -> None:
        self.graph, self._config, self._file = graph, manifest.model, file
        self._checked: list[tuple[int, ...]] = []  # shapes of the last run
        self._output_names = [tensor.name for tensor in graph.outputs]
        self._stay = {tensor.name for tensor in graph.outputs if graph.name == "encoder" and tensor.dtype == "float32"}
        _refuse_what_crashes(file, manifest, settings)
        is_automatic = settings.sess_options is None and checked_kernels(settings.kernels) == "auto"
        is_reference = is_automatic and not manifest.quantization
        if is_reference:
            settings = replace(settings, kernels="onnxruntime")
        opened = GraphFile(file, manifest.external.get(file.name, ()), files or BundleFiles(file.parent))
        self._session, self._weights, self.kernels = _load(opened, settings, manifest.quantization.get(PACKED))
        if is_reference:
            self.kernels = self.kernels.without("weights are in float32")
        opened.check_unchanged()
        if manifest.quantization and (self.kernels.refused or not self.kernels.native) and _loses_products():
            raise ProviderError(
                f"{file}: onnxruntime {onnxruntime.__version__} multiplies integers wrongly on this processor: install "
                "onnxruntime 1.25 or newer, or native kernels, or use a float32 bundle"
            )
        self._session.disable_fallback()  # for runs; older versions of onnxruntime offer no other way
        self._memory = settings.memory(self._session)
        for provider in settings.providers:
            if provider not in self.providers:
                others = ", ".join(self.providers)
                raise ProviderError(f"{file}: {provider} did not start; onnxruntime would use {others} instead")
        try:
            _check_tensors(file, "input", graph.inputs, self._session.get_inputs(), manifest.model)
            _check_tensors(file, "output", graph.outputs, self._session.get_outputs(), manifest.model)
            check_metadata(self._session.get_modelmeta().custom_metadata_map, manifest, file)
        except UnicodeDecodeError as error:
            raise BundleError(f"{file}: contains a name that is not valid text: {error}") from error

    @property
    def providers(self) -> tuple[str, ...]:
        """Execution providers in use, as reported by onnxruntime."""
        return tuple(self._session.get_providers())

    def run(self, feeds: Mapping[str, npt.NDArray[Any] | DeviceArray]) -> dict[str, Any]:
        """Run the graph. Returns outputs by name; the encoder's may stay on its device. Raises ProviderError."""
        try:
            if self._memory is not None:
                return self._memory.run(feeds, self._output_names, self._stay)
            with NATIVE_CALLS:
                arrays = {name: np.asarray(value, order="C") for name, value in feeds.items()}
                outputs = self._session.run(self._output_names, arrays)
        except ONNXRUNTIME_ERRORS as error:
            shapes = {name: tuple(value.shape) for name, value in feeds.items()}
            raise ProviderError(f"{self.graph.name} failed on {self.providers[0]} for {shapes}: {error}") from error
        self._check_shapes(arrays, outputs)
        return dict(zip(self._output_names, outputs, strict=True))

    def _check_shapes(self, feeds: Mapping[str, npt.NDArray[Any]], outputs: Sequence[npt.NDArray[Any]]) -> None:
        """Raise ProviderError if an output has other sizes than the contract and the inputs determine."""
        shapes = [*(feeds[tensor.name].shape for tensor in self.graph.inputs), *(output.shape for output in outputs)]
        if shapes == self._checked:  # chunks of a stream have the same shapes
            return
        config, sizes = self._config, dict[str | int, int]()
        for tensor, shape in zip(self.graph.inputs, shapes, strict=False):
            sizes.update(zip(tensor.axes, shape, strict=True))
        sizes |= {"vocab_size": config.vocab_size, "length_and_eos": sizes.get("length", 0) + 1}
        if "frames" in sizes:
            sizes["time"] = (sizes["frames"] - config.window) // config.subsampling_rate + 1
        for tensor, output in zip(self.graph.outputs, outputs, strict=True):
            expected = tuple(sizes.get(axis, size) for axis, size in zip(tensor.axes, output.shape, strict=True))
            if output.shape != expected:
                raise ProviderError(f"{self._file}: output {tensor.name} is {output.shape}, expected {expected}")
        self._checked = shapes


def _refuse_what_crashes(file: Path, manifest: Manifest, settings: SessionSettings) -> None:
    formats, own = quantized(manifest.quantization.get("groups")), settings.sess_options
    is_plain = own is not None and own.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for kind in formats:
        if is_plain and kind.needs_constants:
            raise ProviderError(
                f"{file}: {kind.bits}-bit weights need onnxruntime's optimisations, but sess_options disables them"
            )
    if OPENVINO not in settings.providers or not formats:
        return
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) <= _OPENVINO_REFUSED:
        raise ProviderError(
            f"{file}: {OPENVINO} of onnxruntime {onnxruntime.__version__} cannot compute integer products, and crashes "
            "the process on some processors; use a float32 bundle with it, or CPUExecutionProvider"
        )


@cache
def _loses_products() -> bool:
    """Return whether integer products are wrong. onnxruntime 1.21 to 1.24 leave some unset on processors with AMX."""
    session = onnxruntime.InferenceSession(_PRODUCT, providers=[DEFAULT_PROVIDER])
    products = session.run(None, {"a": np.ones((64, 4), np.uint8)})[0]
    return bool((products != 4).any())


def _load(
    opened: GraphFile, settings: SessionSettings, layout: int | None
) -> tuple[onnxruntime.InferenceSession, dict[str, npt.NDArray[Any]], Kernels]:
    """Load a session with the chosen kernels. onnxruntime runs the functions that these kernels refuse.

    Kernels refuse functions that they do not know, for example a function with an activation that only another version
    of u2moe has. If their error does not name the refused function, onnxruntime runs all functions.
    """
    kernels = settings.chosen
    if layout is not None and settings.sess_options is None:
        packed = f"{opened.path}: weights are packed"
        if not kernels.native:
            raise KernelsError(f"{packed} for native kernels, but onnxruntime runs the graph: {kernels.reason}")
        if kernels.layout != layout:
            raise KernelsError(
                f"{packed} in layout {layout}, but u2moe-kernels {kernels.version} reads "
                f"layout {kernels.layout}: quantize the float32 bundle again with the installed version"
            )
    while True:
        try:
            return *_inference_session(opened, settings, kernels), kernels
        except BundleError as error:
            if isinstance(error, IntegrityError) or not kernels.native or layout is not None:
                raise
            message = f"u2moe-kernels {kernels.version} cannot run {opened.path.name}"
            others = kernels.without_refused(error.__cause__ or error) or kernels.without(f"{message}: {error}")
            if checked_kernels(settings.kernels) == "native":
                _inference_session(opened, settings, others)  # fails if the graph itself is damaged
                raise KernelsError(f"{message} (onnxruntime's own kernels can): {error}") from error
            kernels = others


def _inference_session(
    opened: GraphFile, settings: SessionSettings, kernels: Kernels
) -> tuple[onnxruntime.InferenceSession, dict[str, npt.NDArray[Any]]]:
    """Create a session, and return it with the weights. It uses their memory, so the caller must keep them."""
    file, options = opened.path, settings.session_options(kernels)
    weights = {} if options is settings.sess_options else opened.weights(kernels.replaces)
    own = [dict(each) for each in settings.provider_options] or None
    # With `enable_fallback`, onnxruntime would print a message and retry.
    make = partial(
        onnxruntime.InferenceSession,
        sess_options=options,
        providers=list(settings.providers),
        provider_options=own,
        enable_fallback=False,
    )
    try:
        if weights:
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
            options.add_external_initializers(list(weights), values)
        try:
            session = make(str(file) if opened.has_external else opened.content)
        except ONNXRUNTIME_ERRORS:
            if OPENVINO not in settings.providers or opened.has_external:
                raise
            session = make(_without_functions(opened.content))
    except ONNXRUNTIME_ERRORS as error:
        opened.check_unchanged()  # raises a clearer error if a file changed
        message = str(error).strip().splitlines()[0][:300]
        if settings.providers != (DEFAULT_PROVIDER,):
            raise ProviderError(f"{file}: {', '.join(settings.providers)} did not start: {message}") from error
        raise BundleError(f"{file}: onnxruntime refuses it: {message}") from error
    return session, weights


def _without_functions(content: bytes) -> bytes:
    """Inline the functions of a graph. OpenVINO needs this for decoders, but fails on encoders without functions."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, "graph.onnx"))
        onnxruntime.InferenceSession(content, options, providers=[DEFAULT_PROVIDER])
        return Path(folder, "graph.onnx").read_bytes()


def _check_tensors(
    file: Path, role: str, expected: Sequence[Tensor], found: Sequence[onnxruntime.NodeArg], config: ModelConfig
) -> None:
    """Check names, element types and ranks, and compare fixed axis sizes with the manifest."""
    names, wanted_names = [node.name for node in found], [tensor.name for tensor in expected]
    if names != wanted_names:
        raise BundleError(f"{file}: {role}s are {names}, expected {wanted_names}")
    for tensor, node in zip(expected, found, strict=True):
        where = f"{file}: {role} {tensor.name}"
        if node.type != _ELEMENT_TYPES[tensor.dtype]:
            raise BundleError(f"{where}: type is {node.type}, expected {_ELEMENT_TYPES[tensor.dtype]}")
        if len(node.shape) != len(tensor.axes):
            raise BundleError(f"{where}: shape is {node.shape}, expected {len(tensor.axes)} axes {tensor.axes}")
        for axis, size in zip(tensor.axes, node.shape, strict=True):
            if isinstance(size, int) and size != (wanted := config.axis(axis)):
                size_expected = "a dynamic size" if wanted is None else wanted
                raise BundleError(f"{where}: axis {axis} is {size}, expected {size_expected}")
