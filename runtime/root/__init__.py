"""Speech recognition with U2++ mixture-of-experts models on ONNX. `u2moe.runtime` is loaded at its first use."""

import os
from typing import TYPE_CHECKING, Any

# onnxruntime reads this variable when it is imported. Every import of u2moe, including `u2moe.runtime`, executes this
# file first. Without the variable, onnxruntime would collect telemetry: it creates a device id and a database in the
# home folder, and looks up network addresses. Forked processes would hang on exit. If the user has set the variable,
# its value is kept.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from u2moe.runtime import *  # noqa: F403

    __version__: str


def __getattr__(name: str) -> Any:
    """Return an object of `u2moe.runtime`. That module is imported only now, so `import u2moe` is fast (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415

        return version("u2moe")
    if name == "__all__":
        return __dir__()
    if name.startswith("_"):
        raise AttributeError(f"module 'u2moe' has no attribute {name!r}")

    import u2moe.runtime  # noqa: PLC0415

    if name == "runtime":
        return u2moe.runtime
    if name not in u2moe.runtime.__all__:
        raise AttributeError(f"module 'u2moe' has no attribute {name!r}")
    return getattr(u2moe.runtime, name)


def __dir__() -> list[str]:
    import u2moe.runtime  # noqa: PLC0415

    return ["__version__", *u2moe.runtime.__all__]
