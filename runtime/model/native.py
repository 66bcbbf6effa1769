"""Find and check the native kernels of the distribution u2moe-kernels, and register them with sessions.

The library of u2moe-kernels defines operators with the names of the functions in our graphs. If the library is
registered, onnxruntime runs these operators instead of the functions. The same bundle therefore runs with and without
the library.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime

from u2moe.runtime.bundle.functions import KERNELS_CONTRACT, is_replaced
from u2moe.runtime.errors import KernelsError
from u2moe.runtime.installation import install_command

KERNELS = ("auto", "native", "onnxruntime")
"""Kernels for the functions of a graph. `native`: the installed library, or an error. `onnxruntime`: onnxruntime only.
`auto`: the library if it is installed and can run the graph."""
VARIABLE = "U2MOE_KERNELS"  # Environment variable with the default choice, one of `KERNELS`
CPU = "CPUExecutionProvider"
_DEFINED = vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
# Exceptions from onnxruntime's C++ code have no public base class.
_FROM_CPP = [kind for kind in _DEFINED if isinstance(kind, type) and issubclass(kind, Exception)]
ONNXRUNTIME_ERRORS: tuple[type[Exception], ...] = (RuntimeError, ValueError, *_FROM_CPP)
_WITHOUT = "u2moe.without"  # Session configuration entry that lists the operators that the library does not replace
_REFUSAL = re.compile(r"\b([A-Z]\w+): (.*)")
_LONGEST_ENTRY = 2000


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels that compute the functions of a model's graphs.

    Attributes:
        native: whether the library of u2moe-kernels is registered.
        version: version of u2moe-kernels; "" without it.
        isa: instruction set that the library uses on this processor; "" without it.
        layout: version of the packed weight layout that the library reads; 0 without it.
        operators: names, without trailing numbers, of the functions that the library replaces; see `replaces`.
        library: file of the library; None without it.
        reason: why the library is not registered; "" if it is.
        refused: functions that the library has operators for but cannot run, with the reasons.
    """

    native: bool
    version: str = ""
    isa: str = ""
    layout: int = 0
    operators: frozenset[str] = frozenset()
    library: Path | None = None
    reason: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the description that commands print."""
        if self.native:
            refused = "".join(f"; not native: {name} ({reason})" for name, reason in self.refused.items())
            return f"u2moe-kernels {self.version} ({self.isa}), onnxruntime {onnxruntime.__version__}{refused}"
        return f"onnxruntime {onnxruntime.__version__} ({self.reason})"

    def data(self) -> dict[str, Any]:
        """Return the fields as JSON values, with `str(self)` as `description`."""
        library = self.library and self.library.name
        return {"description": str(self), **asdict(self), "operators": sorted(self.operators), "library": library}

    def register(self, options: onnxruntime.SessionOptions) -> None:
        """Register the library, if available, for sessions with these options."""
        if self.library is not None:
            if self.refused:
                options.add_session_config_entry(_WITHOUT, ",".join(self.refused))
            options.register_custom_ops_library(str(self.library))

    def replaces(self, function: str) -> bool:
        """Return whether the library computes `function`, a name in the graph that may end in a number."""
        return is_replaced(function, self.operators) and function not in self.refused

    def without_refused(self, error: BaseException) -> Kernels | None:
        """Return these kernels without the function that an onnxruntime error names, or None if it names none."""
        for found in _REFUSAL.finditer(str(error)):
            name, reason = found.groups()
            refused = {**self.refused, name: reason}
            if self.replaces(name) and len(",".join(refused)) <= _LONGEST_ENTRY:
                return replace(self, refused=refused)
        return None

    def without(self, reason: str) -> Kernels:
        """Return these kernels without the library, with `reason` as the explanation."""
        return replace(self, native=False, layout=0, library=None, operators=frozenset(), reason=reason, refused={})


def of_graph(function: str, graph: str) -> str:
    """Return the name under which `Model.kernels.refused` lists a function of a graph."""
    return f"{function} of {graph}"


def checked_kernels(kernels: str | None) -> str:
    """Return one of `KERNELS`, by default that of the environment. Raises ValueError for anything else."""
    name, value = ("kernels", kernels) if kernels is not None else (VARIABLE, os.environ.get(VARIABLE, KERNELS[0]))
    if value not in KERNELS:
        raise ValueError(f"{name} must be one of {', '.join(KERNELS)}, got {value!r}")
    return value


def choose_kernels(kernels: str, providers: Sequence[str]) -> Kernels:
    """Return the kernels for these providers. Raises KernelsError if "native" is not installed or cannot run here."""
    if kernels == "onnxruntime":
        return Kernels(native=False, reason="as requested")
    try:
        if tuple(providers) != (CPU,):
            raise KernelsError(f"native kernels run only on the CPU, not on {', '.join(providers)}")  # noqa: TRY301
        return installed_kernels()
    except KernelsError as error:
        if kernels == "native":
            raise
        return Kernels(native=False, reason=str(error))


@cache
def installed_kernels() -> Kernels:
    """Return the installed native kernels. Raises KernelsError if the installed onnxruntime cannot load them."""
    try:
        package = importlib.import_module("u2moe_kernels")
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "u2moe_kernels":
            raise KernelsError(f"native kernels are not installed: {install_command('kernels')}") from None
        raise KernelsError(f"u2moe-kernels cannot be loaded: {error}") from error
    version = str(package.__version__)
    failures: tuple[type[Exception], ...] = (OSError, *ONNXRUNTIME_ERRORS)
    try:
        description, library = package.description(), Path(package.library_path())
        if (contract := description.get("contract")) != KERNELS_CONTRACT:
            is_older = not isinstance(contract, int) or contract < KERNELS_CONTRACT
            raise KernelsError(
                f"u2moe-kernels {version} is too {'old' if is_older else 'new'}: its operators have contract "
                f"{contract}, but this version of u2moe needs {KERNELS_CONTRACT}: "
                + install_command("kernels" if is_older else "cpu")
            )
        onnxruntime.SessionOptions().register_custom_ops_library(str(library))
    except failures as error:
        message = str(error).strip().splitlines()[0][:300]
        raise KernelsError(
            f"u2moe-kernels {version} cannot run with onnxruntime {onnxruntime.__version__}: {message}"
        ) from error
    isa, layout = str(description["isa"]), int(description["layout"])
    operators = frozenset(map(str, description["operators"]))
    return Kernels(native=True, version=version, isa=isa, layout=layout, operators=operators, library=library)
