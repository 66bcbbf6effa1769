"""What pages show of one mixture of experts on every kind of machine, and its targets. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from u2moe.benchmarks.instruments.rates import best_rate, read_rate
from u2moe.benchmarks.instruments.statistics import spread_of
from u2moe.benchmarks.results.markdown import quartiles, table
from u2moe.benchmarks.results.provenance import machine_key, measured, measured_here
from u2moe.benchmarks.results.targets import Target

FLOAT, INT8, INT4 = "fp32", "int8", "int4-experts"
BITS = {FLOAT: 32, INT8: 8, INT4: 4}
"""Bits of an expert's weight, by recipe."""
LIMIT = 1.15
BOUNDS = {"read_s": "memory-read", "arithmetic_s": "arithmetic"}
TARGETS = {16: "read_s", 250: "arithmetic_s"}
"""Bounds that a layer in int8 should meet within `LIMIT`, by tokens."""
NATIVE_LIMITS = {16: 1.25, 250: 1.0}
"""Limits of a native layer in int8, by tokens: of its time over reading its weights at 16, over its products on
onnxruntime at 250 (see `AMX_LIMIT`)."""
AMX_LIMIT = 0.6
"""The latter with AMX."""
LAYER_BYTES = 160_000_000
"""Bytes of all weights that take turns: more than the last-level cache of most processors."""


def merged(results: Mapping[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Results with those of a run on this machine, which keeps what it has not measured.

    Args:
        results: what the file holds, or nothing.
        content: `measure` with `measured_here`.
    """
    machines = dict(results.get("machines", {}))
    before = machines.get(machine_key(content), {})
    if all(before.get(key) == content[key] for key in ("sizes", "threads")):
        layers = {_place(item): item for item in (*before["layers"], *content["layers"])}
        commits = [*before.get("commits", [before["machine"]["commit"]]), content["machine"]["commit"]]
        content = {
            **content,
            "layers": [layers[place] for place in sorted(layers)],
            "commits": list(dict.fromkeys(commits)),
        }
    machines.pop(machine_key(content), None)
    return {**measured_here(), "machines": {**machines, machine_key(content): content}}


def _place(item: Mapping[str, Any]) -> tuple[int, int]:
    """Where a layer stands in the table."""
    return list(BITS).index(item["recipe"]), item["tokens"]


def targets(results: Mapping[str, Any]) -> list[Target]:
    """A layer in int8 on one thread against the target bounds, on each machine."""
    return [target for content in results["machines"].values() for target in _targets(content)]


def _targets(content: Mapping[str, Any]) -> list[Target]:
    """On onnxruntime, and with native kernels."""
    where = machine_key(content)
    items = [
        item
        for item in content["layers"]
        if item["recipe"] == INT8 and item["tokens"] in TARGETS and content["threads"] == 1
    ]
    plain = [
        Target(
            name=f"{where}: MoE layer at {item['tokens']} tokens / its {BOUNDS[TARGETS[item['tokens']]]} bound",
            found=spread_of(item["seconds"], 1 / item[TARGETS[item["tokens"]]]),
            limit=LIMIT,
            at_most=True,
        )
        for item in items
    ]
    return plain + [_native_target(item, where, content["kernels"]["isa"]) for item in items if "native_s" in item]


def _native_target(item: Mapping[str, Any], where: str, isa: str) -> Target:
    tokens = item["tokens"]
    reads = TARGETS[tokens] == "read_s"
    what, unit = ("reading its weights", item["read_s"]) if reads else ("its products", item["products_s"]["median"])
    limit = AMX_LIMIT if isa == "amx" and not reads else NATIVE_LIMITS[tokens]
    name = f"{where}: native MoE layer at {tokens} tokens / {what}"
    return Target(name=name, found=spread_of(item["native_s"], 1 / unit), limit=limit, at_most=True)


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a table for each machine, and the layers of the targets on the machine measured last."""
    machines = list(results["machines"].values())
    found = {
        "tables": "\n\n".join(line for content in machines for line in _page(content)),
        "threads": str(machines[-1]["threads"]),
        **{name: str(size) for name, size in machines[-1]["sizes"].items()},
    }
    for item in machines[-1]["layers"]:
        if item["recipe"] == INT8 and (key := TARGETS.get(item["tokens"])):
            found |= {
                f"ratio_at_{item['tokens']}": f"{item['seconds']['median'] / item[key]:.2f}",
                f"products_at_{item['tokens']}": f"{item['products_s']['median'] / item[key]:.2f}",
            }
    return found


def _page(content: Mapping[str, Any]) -> Iterator[str]:
    """The table of one machine: a row for each recipe and number of tokens; and its rates."""
    header = (
        "experts", "tokens", "with tokens", "layer", "products", "native", "read", "arithmetic", "layer / bound",
        "native / bound",
    )  # fmt: skip
    rates = dict(content["rates"])
    integer, floats = (f"{best_rate(rates, kind) / 1e9:.0f}" for kind in ("integer", "float"))
    yield f"### {machine_key(content)}"
    yield (
        f"{measured(content)} {read_rate(rates, LAYER_BYTES) / 1e9:.1f} GB/s, {integer} · 10^9 (integers) or "
        f"{floats} · 10^9 (float32) multiply-adds per second."
    )
    yield table(header, map(_row, sorted(content["layers"], key=_place)))


def _row(item: Mapping[str, Any]) -> tuple[object, ...]:
    times = [
        quartiles(spread_of(item[key], 1e3)) if key in item else "" for key in ("seconds", "products_s", "native_s")
    ]
    bounds = (f"{1e3 * item[key]:.2f}" for key in ("read_s", "arithmetic_s"))
    native = f"{item['native_s']['median'] / item['least_s']:.2f}" if "native_s" in item else ""
    return item["recipe"], item["tokens"], f"{item['experts']:.1f}", *times, *bounds, f"{item['ratio']:.2f}", native
