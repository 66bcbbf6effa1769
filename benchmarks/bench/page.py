"""What `u2moe bench` told of the demo model, for README.md, and the pictures of it in docs/. Measures nothing.

`u2moe bench --json benchmarks/results/bench.json` measures; `python -m u2moe.benchmarks.bench.page` draws.
"""

from __future__ import annotations

from pathlib import Path

from u2moe.benchmarks.bench.plots import draw
from u2moe.benchmarks.bench.terminal import Report, describe
from u2moe.benchmarks.results.json_file import read_json

RESULTS = Path(__file__).parents[1] / "results" / "bench.json"
PICTURES = {
    "stages": "Real-time factor end to end, and the share of each stage",
    "waits": "What a listener waits for, in real time",
    "bound": "Time of each part, and what it takes at least",
}
"""Those of the plots that are shown, with what they are of."""
PREFIX = "bench-"


def table(report: Report) -> str:
    """The tables as the terminal shows them, below the pictures."""
    pictures = [f"![{title}](../docs/{PREFIX}{name}.png)" for name, title in PICTURES.items()]
    return "\n\n".join([*pictures, f"```text\n{describe(report)}\n```"]) + "\n"


def main() -> None:
    """Draw the pictures anew."""
    for file in draw(read_json(RESULTS), RESULTS.parents[2] / "docs", names=PICTURES, prefix=PREFIX):
        print(f"wrote {file}")


if __name__ == "__main__":
    main()
