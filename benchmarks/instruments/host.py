"""Description of the measuring machine: processor, memory and software, as reported by the system."""

import datetime as dt
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from u2moe.runtime.model.native import CPU, checked_kernels, choose_kernels

_VERSION_FIELDS = ("cpu family", "model", "stepping")  # of processors whose name a virtual machine may hide

INSTRUCTION_SETS = (
    *("sse4_1", "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "fphp", "sve", "sve2", "sme"),
)
"""Flags in /proc/cpuinfo that affect the speed of matrix products, on x86 and ARM."""

_CPUINFO, _MEMINFO, _STATUS, _STAT = map(Path, ("/proc/cpuinfo", "/proc/meminfo", "/proc/self/status", "/proc/stat"))
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def describe_machine() -> dict[str, Any]:
    """Return processor, memory and software as JSON data. Fields that the system does not report are None or empty."""
    fields = cpu_fields(_CPUINFO)
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "processor": processor(fields),
        "processor_version": ", ".join(f"{name} {fields[name]}" for name in _VERSION_FIELDS if name in fields),
        "architecture": platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "num_cores": os.cpu_count(), "usable_cores": usable_cores(),
        "caches": caches(_CACHES), "memory_bytes": memory_bytes("MemTotal"), "system": platform.platform(),
        "python": platform.python_version(), "numpy": np.__version__, "onnxruntime": onnxruntime.__version__,
        "kernels": str(choose_kernels(checked_kernels(None), [CPU])),
        "providers": onnxruntime.get_available_providers(),
        "u2moe": version("u2moe"), "commit": commit(Path(__file__)),
    }  # fmt: skip


def report_head(form: str, number: int, providers: Sequence[str]) -> dict[str, Any]:
    """Return the first entries of a report: its format and version, the time, the machine, and the providers."""
    about = {"format": form, "version": number, "time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds")}
    return {**about, "machine": describe_machine(), "providers": list(providers)}


def cpu_fields(file: Path = _CPUINFO) -> dict[str, str]:
    """Return the /proc/cpuinfo fields of the first processor and those of the machine, such as its board's name."""
    fields: dict[str, str] = {}
    for line in _read(file).splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def processor(fields: Mapping[str, str]) -> str:
    """Return the name of the processor; on ARM, the board's name, the implementer and the part number."""
    if "model name" in fields:
        return fields["model name"]
    numbers = " ".join(f"{name} {fields[name]}" for name in ("CPU implementer", "CPU part") if name in fields)
    return ", ".join(part for part in (fields.get("Model", ""), numbers) if part) or platform.processor() or "unknown"


def usable_cores() -> int:
    """Return the number of cores on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_times() -> tuple[float, float, float] | None:
    """Return the time, and the CPU seconds of all processes and of this one with its children; None if unknown."""
    fields = _read(_STAT).partition("\n")[0].split()[1:]
    if len(fields) < 8:
        return None
    user, nice, system, _, _, irq, softirq, _ = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields[:8])
    return time.monotonic(), user + nice + system + irq + softirq, sum(os.times()[:4])


def other_cores(begin: tuple[float, float, float] | None) -> float | None:
    """Return how many cores other processes have used on average since `begin`, from `cpu_times`; None if unknown."""
    if begin is None or (now := cpu_times()) is None:
        return None
    elapsed, busy, own = (after - before for before, after in zip(begin, now, strict=True))
    return max(busy - own, 0.0) / max(elapsed, 1e-9)


def caches(folder: Path) -> dict[str, int]:
    """Return the first core's data cache sizes in bytes, by level. L3 may be shared, even between virtual machines."""
    sizes = {}
    for entry in sorted(folder.glob("index*")):
        if _read(entry / "type").strip() != "Instruction" and (size := _read(entry / "size").strip()):
            sizes[f"L{_read(entry / 'level').strip()}"] = int(size.removesuffix("K")) * 1024
    return sizes


def memory_bytes(name: str, file: Path | None = None) -> int | None:
    """Return a field of `file` (default: /proc/meminfo), such as "MemTotal", in bytes; None if the field is missing."""
    for line in _read(file or _MEMINFO).splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def status_bytes(name: str, process: int | None = None) -> int | None:
    """Return a field of a process's status (default: this process), in bytes; None if the field is missing.

    "VmHWM" is the peak resident memory. Unlike this field, getrusage would include the parent's memory before exec.
    """
    return memory_bytes(name, _STATUS if process is None else Path(f"/proc/{process}/status"))


def commit(file: Path) -> str | None:
    """Return the commit of the repository that contains a source file; None without a repository.

    A "+" marks uncommitted changes. For an installed package, the repository in the current folder counts if it
    contains an identical copy of the file.
    """
    copy = Path(*file.parts[-3:]).resolve()  # for example benchmarks/instruments/host.py
    for source in (file, copy):
        try:
            _git(source.parent, "ls-files", "--error-unmatch", source.name)
            if source.read_bytes() == file.read_bytes():
                return _git(source.parent, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
        except (OSError, subprocess.CalledProcessError):
            continue
    return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


class EnergyMeter:
    """Meter of the energy of all processor packages (zones in `folder`). `missing` says why it cannot be read."""

    def __init__(self, folder: Path = Path("/sys/class/powercap")) -> None:
        # The other zones are parts of packages, or count a package twice.
        packages = [zone for zone in sorted(folder.glob("*-rapl:*")) if _read(zone / "name").startswith("package")]
        counters = [zone / name for zone in packages for name in ("energy_uj", "max_energy_range_uj")]
        self.missing = "" if packages else f"{folder} has no processor energy counter (RAPL)"
        if unread := [file for file in counters if not _read(file).strip().isdecimal()]:
            self.missing = f"{unread[0]} cannot be read: most systems require root"
        self._zones = {} if self.missing else {zone: int(_read(zone / "max_energy_range_uj")) for zone in packages}
        self._last = self._counted()

    def joules(self) -> float | None:
        """Return the joules used since construction or the last call; None if the energy cannot be read."""
        if not self._zones:
            return None
        before, self._last = self._last, self._counted()
        pairs = zip(before, self._last, self._zones.values(), strict=True)
        return sum((now - then) % largest for then, now, largest in pairs) / 1e6  # counters wrap around

    def _counted(self) -> list[int]:
        return [int(_read(zone / "energy_uj")) for zone in self._zones]
