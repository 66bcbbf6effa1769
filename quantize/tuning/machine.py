"""The processor of this machine, as reported by the system, for measurements and for those who read them."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

INSTRUCTION_SETS = (
    *("sse4_1", "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "fphp", "sve", "sve2", "sme"),
)
"""Flags in /proc/cpuinfo that determine the speed of matrix products, on x86 and ARM."""

CPUINFO = Path("/proc/cpuinfo")


def cpu_fields(file: Path = CPUINFO) -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo, and those after all processors (the model of ARM boards).

    Empty without the file.
    """
    fields: dict[str, str] = {}
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return fields
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def processor(fields: Mapping[str, str]) -> str:
    """Name of the processor: on x86 its name, on ARM boards numbers and the name of the board."""
    if "model name" in fields:
        return fields["model name"]
    numbers = " ".join(f"{name} {fields[name]}" for name in ("CPU implementer", "CPU part") if name in fields)
    return ", ".join(part for part in (fields.get("Model", ""), numbers) if part) or platform.processor() or "unknown"


def instruction_sets(fields: Mapping[str, str]) -> list[str]:
    """Those of `INSTRUCTION_SETS` that the processor has."""
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return [name for name in INSTRUCTION_SETS if name in flags]
