"""Which operators of a bundle do execution providers lack, by their documentation? For those that do not run here.

provider_operators.json holds their lists of operators, with the page and the commit that each was taken from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir

from u2moe.benchmarks.results.files import read_json, repository
from u2moe.benchmarks.results.markdown import table
from u2moe.runtime import Bundle

_FOLDED = ("Constant", "Identity")
"""onnxruntime removes these before it asks a provider."""


@cache
def documented() -> dict[str, Any]:
    """By provider: `operators` (those of other domains as domain:name), `page`, `commit`, `wheel`, `limits`."""
    content: dict[str, Any] = read_json(repository() / "benchmarks" / "runtimes" / "provider_operators.json")
    return content


def operators_of(bundle: Path) -> dict[str, int]:
    """Nodes of the encoder, the CTC head and the decoder by operator, with functions in place of their calls."""
    counts: Counter[str] = Counter()
    for graph in Bundle.open(bundle).manifest.model.graphs():
        model = ir.load(bundle / graph.file)
        counts += _expanded(model.graph, model.functions)
    return dict(sorted(counts.items()))


def _expanded(nodes: Iterable[ir.Node], functions: Mapping[ir.OperatorIdentifier, ir.Function]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for node in nodes:
        function = functions.get(node.op_identifier())
        if function is not None:
            counts += _expanded(function, functions)
        elif node.op_type not in _FOLDED:
            counts[f"{node.domain}:{node.op_type}" if node.domain else node.op_type] += 1
    return counts


def lacking(operators: Mapping[str, int], provider: str) -> dict[str, int]:
    """Those of the operators that the documentation of a provider does not list."""
    known = set(documented()[provider]["operators"].split())
    return {name: count for name, count in operators.items() if name not in known}


def paper_table(operators: Mapping[str, Mapping[str, int]]) -> str:
    """A row for each provider and bundle: what it lacks.

    Args:
        operators: by name of a bundle, see `operators_of`.
    """
    rows = []
    for provider, item in documented().items():
        for bundle, counts in operators.items():
            missing = lacking(counts, provider)
            names = ", ".join(f"`{name.removeprefix('com.microsoft:')}`" for name in missing) or "none"
            share = f"{sum(missing.values())} of {sum(counts.values())}"
            rows.append((provider, bundle, share, names, item["limits"]))
    return table(("provider", "bundle", "nodes", "operators not listed", "and"), rows, left=5)


def sources() -> str:
    """Where the lists come from."""
    items = (f"{name}: {item['page']}, commit {item['commit'][:12]}" for name, item in documented().items())
    return "; ".join(items)
