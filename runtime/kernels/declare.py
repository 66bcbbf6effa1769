"""Write `source/declared.h`, the constants that the kernels share with Python. A test checks that it is up to date."""

from pathlib import Path

from u2moe.runtime.bundle import functions
from u2moe.runtime.graph.activation import ACTIVATIONS

HEADER = Path(__file__).with_name("source") / "declared.h"


def header() -> str:
    """Return the content of `source/declared.h`."""
    *names, last = ACTIVATIONS
    rows = ",\n".join(f'    {{"{name}", {float(row.lowest or 0)!r}f}}' for name, row in ACTIVATIONS.items())
    constants = "\n".join(f'constexpr const char* k{name} = "{name}";' for name in functions.NATIVE)
    return f"""\
// Made by declare.py from runtime/bundle/functions.py and runtime/graph/activation.py; do not edit.
#pragma once
#include <cstddef>
#include <cstdint>

namespace u2moe {{

// Version of the operators' inputs, attributes and results.
constexpr int64_t kContract = {functions.KERNELS_CONTRACT};
// Version of the layout of packed weights.
constexpr int64_t kLayout = {functions.PACKED_LAYOUT};
// Number of names under which an operator is registered: its own, and the same name followed by _2, _3 and so on.
constexpr size_t kNumbers = {functions.MOST_NUMBERS};

enum class Activation {{ {", ".join(ACTIVATIONS)} }};
struct DeclaredActivation {{
  const char* name;
  float lowest;  // lowest possible output if rows are scaled by their maximum; otherwise 0
}};
constexpr DeclaredActivation kActivations[] = {{
{rows}}};
constexpr const char* kActivationNames = "{", ".join(names)} or {last}";

// Names of operators.
namespace names {{
{constants}
constexpr size_t kCount = {len(functions.NATIVE)};
}}  // namespace names

}}  // namespace u2moe
"""


if __name__ == "__main__":
    HEADER.write_text(header(), encoding="utf-8")
