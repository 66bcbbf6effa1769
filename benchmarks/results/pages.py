"""Write the numbers and tables of all pages in docs/ from the JSON files in benchmarks/results.

    python -m u2moe.benchmarks.results.pages [--check]

For results/NAME.json, the function `values(results)` of the study NAME returns values by key. The value of KEY is
written between `<!-- begin NAME.KEY -->` and `<!-- end NAME.KEY -->`; if there are no results, "(not measured)" is
written instead. Marks without a dot belong to other scripts. The table of targets contains the `targets(results)` of
all studies.
"""

import argparse
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from u2moe.benchmarks import studies
from u2moe.benchmarks.results.files import measured, read_json, repository
from u2moe.benchmarks.results.markdown import Target, filled, names, table
from u2moe.benchmarks.studies.shared.script import script

NOT_MEASURED = "(not measured)"


def all_values(folder: Path) -> dict[str, dict[str, str]]:
    """Return the values of each results file in `folder`, and those of the targets."""
    found, targets = dict[str, dict[str, str]](), list[Target]()
    for name in study_names():
        found[name] = {}
        if results := read_json(folder / f"{name}.json"):
            module = _module(name)
            found[name] = {"measured": measured(results)} if "machine" in results else {}
            found[name] |= module.values(results)
            targets += module.targets(results) if hasattr(module, "targets") else []
    rows = table(("target", "machine", "measured", "limit", "met"), (target.row for target in targets), left=5)
    met, total = str(sum(target.met for target in targets)), str(len(targets))
    return {**found, "targets": {"table": rows, "met": met, "total": total}}


def study_names() -> list[str]:
    """Return the names of the studies in `studies/`; the results of NAME are in results/NAME.json."""
    return sorted(module.name for module in pkgutil.iter_modules(studies.__path__) if not module.ispkg)


def _module(name: str) -> Any:
    return importlib.import_module(f"u2moe.benchmarks.studies.{name}")


@script
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status. Raise ValueError for a mark of unknown name or without an end."""
    parser = argparse.ArgumentParser(prog="python -m u2moe.benchmarks.results.pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is outdated")
    args, root, changed = parser.parse_args(arguments), repository(), dict[Path, str]()
    values = all_values(root / "benchmarks" / "results")
    everywhere = {f"{name}.{key}": value for name, own in values.items() for key, value in own.items()}
    missing = tuple(f"{name}." for name, own in values.items() if not own)
    for page in sorted((root / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        marks = {name for name in names(text, str(page)) if "." in name}
        known = {**everywhere, **{name: NOT_MEASURED for name in marks if name.startswith(missing)}}
        if unknown := marks - known.keys():
            raise ValueError(f"{page}: unknown marks: {', '.join(sorted(unknown))}")
        if (shown := filled(text, known)) != text:
            changed[page] = shown
    for page, text in changed.items():
        print(f"{page.relative_to(root)}: {'outdated' if args.check else 'written'}")
        if not args.check:
            page.write_text(text, encoding="utf-8")
    return int(args.check and bool(changed))
