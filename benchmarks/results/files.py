"""JSON files of results: their paths in a clone of u2moe, and the machine and day of the measurement."""

import datetime as dt
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from u2moe.benchmarks.instruments.host import describe_machine
from u2moe.runtime.bundle.manifest import MANIFEST_FILE
from u2moe.runtime.whole_file import write_text


def repository() -> Path:
    """Return the root of the clone, the current folder. Raise FileNotFoundError if that is not a clone."""
    here = Path.cwd()  # an installed package does not know where the clone is
    if not (here / "benchmarks" / "results").is_dir():
        raise FileNotFoundError(f"run this in the root of a u2moe clone, not in {here}, or name the files to use")
    return here


def results_file(name: str) -> Path:
    """Return the results file of a study, as a path relative to the root of a clone."""
    return Path("benchmarks", "results", f"{name}.json")


def read_json(file: Path) -> dict[str, Any]:
    """Return the content of a results file, or {} if the file does not exist."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a results file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=0) + "\n")


def measured_here() -> dict[str, Any]:
    """Return the entries `machine` and `date` for new results."""
    return {"machine": describe_machine(), "date": dt.datetime.now(dt.UTC).date().isoformat()}


def kind_of(machine: Mapping[str, Any]) -> str:
    """Return processor, family and model. All generations of AMD EPYC may have the same name of the processor."""
    fields = machine.get("processor_version") or ""
    version = ", ".join(field for field in fields.split(", ") if field and not field.startswith("stepping"))
    return f"{machine['processor']} ({version})" if version else str(machine["processor"])


def machine_key(content: Mapping[str, Any]) -> str:
    """Return a key: the kind of machine that produced the results, and the instruction set of its native kernels."""
    return f"{kind_of(content['machine'])}, {content['kernels']['isa'] or 'without native kernels'}"


def resumed(file: Path, fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Return results in `file` over those in `fresh`. Raise ValueError if they come from another kind of machine."""
    content, here = read_json(file), kind_of(describe_machine())
    if "machine" in content and (before := kind_of(content["machine"])) != here:
        raise ValueError(f"{file}: measured on {before}, but this machine is {here}; name another file")
    return {**fresh, **content}


def record(file: Path, content: dict[str, Any]) -> None:
    """Write results of a study that measures piece by piece. Add `machine`, `date` and the `commits` of all pieces."""
    content |= measured_here()
    content["commits"] = list(dict.fromkeys([*content.get("commits", []), content["machine"]["commit"]]))
    write_json(file, content)


def of_bundle(folder: Path) -> dict[str, str]:
    """Return the entry `bundle` for results: the SHA-256 of the manifest, which contains the digests of all files."""
    return {"bundle": hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()}


def publish(
    file: Path,
    found: Mapping[str, Any],
    values: Callable[[Mapping[str, Any]], Mapping[str, str]],
    *,
    bundle: Path | None = None,
    part: str = "",
    per_machine: bool = False,
) -> None:
    """Write results `found`, with the machine and the date, to a JSON file. Print the tables of the results.

    `values` is the study's function that returns the values for pages. It gets only the new results. `bundle` is the
    measured bundle, if there is exactly one. If `part` is given, only this part of the file is replaced. `per_machine`:
    keep the file's results from other kinds of machines; see `machine_key`.
    """
    content = {**measured_here(), **(of_bundle(bundle) if bundle else {}), **found}
    if per_machine:
        machines, content = read_json(file).get("machines", {}), {machine_key(content): content}
        shown, whole = {"machines": content}, {"machines": {**machines, **content}}
    elif part:
        shown = {part: content}
        whole = {**read_json(file), **shown}
    else:
        shown = whole = content
    write_json(file, whole)
    print("\n\n".join(text for text in values(shown).values() if "\n" in text))


def tables_by_machine(results: Mapping[str, Any], tables: Callable[[Mapping[str, Any]], Iterable[str]]) -> str:
    """Return the `tables` of each machine below the machine's name, the last machine first; see `publish`."""
    machines = reversed(results["machines"].values())
    return "\n\n".join(text for content in machines for text in (f"### {machine_key(content)}", *tables(content)))


def measured(content: Mapping[str, Any]) -> str:
    """Return a sentence with processor, cores, onnxruntime, commit ("+": the clone was changed) and date of results."""
    machine, date = content["machine"], content.get("date", content.get("time", ""))[:10]
    cores = f"{machine['usable_cores']} core{'s' if machine['usable_cores'] > 1 else ''}"
    *more, commit = content.get("commits", [machine["commit"]])
    commits = f"commit {commit}{f' and {len(more)} before it' if more else ''}"
    return f"Measured on {kind_of(machine)}, {cores}, onnxruntime {machine['onnxruntime']}, {commits}, {date}."
