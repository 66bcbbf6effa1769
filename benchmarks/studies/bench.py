"""How fast is the demo model, and how close does it come to the machine's limits? Formats a report of `u2moe bench`.

u2moe bench runtime/demo --output benchmarks/results/bench.json
"""

from u2moe.benchmarks.bench.terminal import Report, describe


def values(report: Report) -> dict[str, str]:
    """Return the printed tables, real-time factors, load time, peak memory, and numbers of parameters."""
    first = report["plan"]["threads"][0]
    speed = {entry["mode"]: entry for entry in report["speed"] if entry["threads"] == first}
    (footprint,), (costs,) = report["footprint"].values(), report["costs"].values()
    found = {"table": f"```text\n{describe(report)}\n```"}
    for name, mode in (("full", "full context"), ("chunks", "chunk 16, left 4")):
        found[f"rtf_{name}"] = f"{speed[mode]['real_time_factor']['median']:.4f}"
    found["start_ms"] = f"{1e3 * (footprint['verify_s']['median'] + footprint['load_s']['median']):.0f}"
    found["peak_mb"] = f"{footprint['peak_bytes']['median'] / 1e6:.0f}"
    found["parameters"], found["active"] = (f"{costs['parameters'][key] / 1e6:.1f}" for key in ("total", "active"))
    return found
