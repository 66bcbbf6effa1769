"""Writes the table of golden networks with a graph of fixed shape in docs/npu.md. It takes some minutes.
PYTHONPATH=tests:tests/toys python tests/golden/fixed_shapes.py"""

import tempfile
from collections import defaultdict
from pathlib import Path

from conftest import write_bundle
from wenet_directories import CONFIGURATIONS, configured, write_configuration

from u2moe.export import convert_static
from u2moe.runtime import Bundle, UnsupportedError

PAGE = Path(__file__).parents[2] / "docs" / "npu.md"
BEGIN, END = "<!-- by tests/golden/fixed_shapes.py -->\n", "<!-- end -->\n"


def outcome(name):
    """Return the largest difference of log-probabilities, or the reason for a refusal."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(write_configuration(name, Path(folder, "checkpoint")), Path(folder, "bundle"))
        config = Bundle.open(bundle).manifest.model
        size = config.static_chunk_size or config.whole_chunk(4)
        try:
            written = convert_static(bundle, Path(folder, "static"), chunk_size=size, num_left_chunks=2)
        except UnsupportedError as error:
            return str(error).rpartition(": ")[2]
        return max(item.difference for item in written.report.comparisons if item.tensor == "log_probs")


def rows(names):
    """Yield the lines of the table, one for each kind of encoder."""
    found = defaultdict(dict)
    for name in names:
        found[configured(CONFIGURATIONS[name])[0]["encoder"]][name] = outcome(name)
        print(name, flush=True)
    for encoder, networks in sorted(found.items()):
        differences = [each for each in networks.values() if isinstance(each, float)]
        refused = defaultdict(list)
        for name, each in networks.items():
            if isinstance(each, str):
                refused[each].append(f"`{name}`")
        told = "; ".join(f"{', '.join(own)}: {reason}" for reason, own in refused.items()) or "none"
        worst = f"{max(differences):.1e}" if differences else ""
        yield f"| `{encoder}` | {len(differences)} of {len(networks)} | {worst} | {told} |\n"


def main():
    """Write the table."""
    names = [name for name in CONFIGURATIONS if not name.startswith("pair_")]
    head = "| encoder | networks that convert | largest difference | refused |\n| --- | ---: | ---: | --- |\n"
    table = head + "".join(rows(names))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
