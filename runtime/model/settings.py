"""Settings of onnxruntime sessions: execution providers, threads and kernels."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from u2moe.runtime.errors import KernelsError, ProviderError
from u2moe.runtime.model.device import DeviceMemory
from u2moe.runtime.model.native import Kernels, checked_kernels, choose_kernels, installed_kernels
from u2moe.runtime.validation import checked_integer

DEFAULT_PROVIDER = "CPUExecutionProvider"
WHEELS = {
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "TensorrtExecutionProvider": "onnxruntime-gpu",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "DmlExecutionProvider": "onnxruntime-directml (Windows)",
    "CoreMLExecutionProvider": "onnxruntime (macOS)",
    "QNNExecutionProvider": "onnxruntime-qnn",
    "WebGpuExecutionProvider": "onnxruntime-webgpu",
    "MIGraphXExecutionProvider": "onnxruntime-migraphx",
    "ROCMExecutionProvider": "onnxruntime-rocm",
}
"""PyPI package of each provider. Most replace onnxruntime, so only one of them can be installed."""


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """Settings of a model's sessions.

    Attributes:
        providers: execution providers in order of preference. All must be installed and able to start.
        provider_options: a mapping for each provider, in the order of `providers`; empty: no options. The CPU provider
            accepts no options.
        num_threads: threads within one operator, up to four per processor (32 are always allowed). None: 1, or as in
            `sess_options`. With one thread, results are bit-identical and other cores stay free.
        sess_options: replaces our session options and is used unchanged. Our options disable spinning after a run. They
            also disable memory patterns, because onnxruntime would keep a pattern for each of the many shapes of
            chunks. With `sess_options`, weight files stay mapped.
        kernels: "native": the kernels of u2moe-kernels. "onnxruntime": those of onnxruntime only. "auto": native
            kernels if they are installed and can run the graph, except for float32 bundles, whose results must not
            depend on installed packages. None: the environment variable U2MOE_KERNELS, or "auto". To use
            native kernels with `sess_options`, register their library there yourself.
        io_binding: whether encoder outputs stay in the memory of the provider's device, where the next chunk and the
            other graphs read them. None: true on all providers except the CPU. Results do not depend on it.
        public_keys: public keys in PEM, one for each allowed signer. `Recognizer.load` then loads only bundles signed
            with one of them; see `Bundle.open`. None: any bundle is loaded.

    Raises:
        ValueError: a value is out of range or of the wrong type, or two values cannot be combined.
        ProviderError: a provider is not installed.
        KernelsError: native kernels were requested, but are not installed or cannot run here.
    """

    providers: Sequence[str] = (DEFAULT_PROVIDER,)
    provider_options: Sequence[Mapping[str, Any]] = ()
    num_threads: int | None = None
    sess_options: onnxruntime.SessionOptions | None = None
    kernels: str | None = None
    io_binding: bool | None = None
    public_keys: Sequence[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "providers", _several("providers", self.providers, str))
        object.__setattr__(self, "provider_options", _several("provider_options", self.provider_options, Mapping))
        if self.public_keys is not None:
            object.__setattr__(self, "public_keys", _several("public_keys", self.public_keys, str))
        if not self.providers:
            raise ValueError("providers must name at least one provider")
        if self.provider_options and len(self.provider_options) != len(self.providers):
            expected = f"an entry for each of {len(self.providers)} providers"
            raise ValueError(f"provider_options must have {expected}, got {len(self.provider_options)}")
        if self.num_threads is not None:
            # More threads are not faster, and onnxruntime takes minutes to start a thousand.
            checked_integer("num_threads", self.num_threads, least=1, most=max(32, 4 * (os.cpu_count() or 1)))
        if self.sess_options is not None and not isinstance(self.sess_options, onnxruntime.SessionOptions):
            raise ValueError(f"sess_options must be onnxruntime.SessionOptions or None, got {self.sess_options!r}")
        if self.num_threads is not None and self.sess_options is not None:
            raise ValueError("num_threads and sess_options cannot be combined: set sess_options.intra_op_num_threads")
        for provider, options in zip(self.providers, self.provider_options, strict=False):
            if provider == DEFAULT_PROVIDER and options:  # onnxruntime would ignore them
                raise ValueError(f"{provider} takes no options, got {next(iter(options))!r}: use sess_options")
        available = onnxruntime.get_available_providers()
        for provider in self.providers:
            if provider not in available:
                wheel = WHEELS.get(provider)
                remedy = f"it is in the package {wheel}" if wheel else "no known package on PyPI has it"
                raise ProviderError(f"{provider} is not installed: {remedy}; installed: {', '.join(available)}")
        if self.kernels == "native" and self.sess_options is not None:
            remedy = "sess_options.register_custom_ops_library(str(u2moe_kernels.library_path()))"
            raise ValueError(f"kernels and sess_options cannot be combined: call {remedy}")
        self.chosen  # noqa: B018 - fail here, not at the first session

    @property
    def chosen(self) -> Kernels:
        """Kernels to use for graphs that they can run.

        Raises:
            ValueError: `kernels` is unknown.
            KernelsError: native kernels were requested, but are not installed or cannot run here.
        """
        kernels = checked_kernels(self.kernels)
        if self.sess_options is not None:
            return Kernels(native=False, reason="or kernels registered in sess_options")
        return choose_kernels(kernels, self.providers)

    def memory(self, session: onnxruntime.InferenceSession) -> DeviceMemory | None:
        """Return the memory of a session's device, or None if the session's values are arrays on the host."""
        provider, options = self.providers[0], (self.provider_options or ({},))[0]
        if not (provider != DEFAULT_PROVIDER if self.io_binding is None else self.io_binding):
            return None
        return DeviceMemory(session, provider, int(options.get("device_id", 0)))

    @property
    def search_library(self) -> Path | None:
        """Native library for the first pass, whatever the provider. None: excluded by `kernels`, or not installed."""
        if checked_kernels(self.kernels) == "onnxruntime":
            return None
        try:
            return installed_kernels().library
        except KernelsError:
            return None

    def session_options(self, kernels: Kernels | None = None) -> onnxruntime.SessionOptions:
        """Return `sess_options` if given, otherwise session options with `kernels` (None: the `chosen` kernels)."""
        if self.sess_options is not None:
            return self.sess_options
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.num_threads or 1
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False
        options.enable_mem_reuse = False  # planning it takes onnxruntime 1.24 to 1.31 two seconds per encoder
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 4  # a library must not print; the caller gets errors as exceptions
        (kernels or self.chosen).register(options)
        return options


def _several(name: str, values: object, kind: type[Any]) -> tuple[Any, ...]:
    """Check an option that is a sequence of names or of mappings, and return it as a tuple."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(isinstance(one, kind) for one in values):
        expected = "names" if kind is str else "mappings, one for each provider"
        raise ValueError(f"{name} must be a sequence of {expected}, got {values!r}")
    return tuple(values)
