"""Packages of the runtime: imports go one way between and within them, and private names are not used outside."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import u2moe.runtime

ROOT = Path(__file__).parent.parent
RUNTIME = ROOT / "runtime"
ORDER = (
    "errors", "log", "installation", "bundle_location", "validation", "declarations", "whole_file", "result", "text",
    "language", "options", "audio", "bundle", "model", "bundle_folder", "bundle_writer", "graph", "decoding", "stream",
    "recognition", "recognizer", "transcriber_thread", "transcriber", "__init__", "corpus", "server", "cli", "root",
)  # fmt: skip
"""Packages and top-level files, from the lowest layer to the highest. Each imports only earlier ones."""
SEPARATE = {"kernels", "cpp", "web", "demo"}
"""Folders of `runtime/` that are separate distributions, or data."""
EXAMPLES = [*(ROOT / "examples").glob("*.py"), *(ROOT / "examples" / "cluster").glob("*.py")]


def modules(folder=RUNTIME):
    """Return the files by their module names below `u2moe.runtime`."""
    found = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        if parts[0] not in SEPARATE:
            found[".".join(parts)] = file
    return found


def imports(name, known):
    """Yield (module, name) of all imports from the runtime, including those for types and within functions."""
    for node in ast.walk(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[:2] == ["u2moe", "runtime"]:
            module = ".".join(node.module.split(".")[2:])
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                if inner in known or f"{inner}.__init__" in known:
                    yield (inner if inner in known else f"{inner}.__init__"), None
                else:
                    yield (module if module in known else f"{module}.__init__".lstrip(".")), alias.name


def room(name):
    return name.split(".")[0]


def test_rooms_have_a_place_private_names_and_imports_downhill_without_a_circle():
    assert {room(name) for name in modules()} == set(ORDER)
    known = modules()
    uphill = {
        f"{name} imports {module}"
        for name in known
        for module, _ in imports(name, known)
        if ORDER.index(room(module)) > ORDER.index(room(name))
    }
    assert not uphill
    known = modules()
    graph = {name: {module for module, _ in imports(name, known) if module != name} for name in known}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    known = modules()
    private = {
        f"{name} imports {module}.{imported}"
        for name in known
        for module, imported in imports(name, known)
        if module != name and imported is not None and imported.startswith("_") and not imported.startswith("__")
    }
    assert not private


def defined_in(tree):
    """Return the names of functions, classes, variables and attributes defined in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id


PUBLIC_ALTHOUGH = {"_asdict", "_exit", "_replace"}
"""Documented names of the standard library (os, namedtuple)."""


def test_private_attributes_stay_in_their_file_and_examples_use_what_is_public():
    foreign = set()
    for name, file in modules().items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        own = {*defined_in(tree), *PUBLIC_ALTHOUGH}
        foreign |= {
            f"{name} uses {ast.unparse(node)}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
            and node.attr not in own
        }  # fmt: skip
    assert not foreign
    allowed = documented() | {
        f"{module}.{name}" for module in ("u2moe", "u2moe.runtime") for name in u2moe.runtime.__all__
    }
    assert len(EXAMPLES) >= 2
    for file in EXAMPLES:
        used = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "u2moe"
            for alias in node.names
        }
        assert used
        assert used <= allowed, file


def documented():
    """Return the modules and names that `docs/api/` describes."""
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    return {line.removeprefix("::: ").strip() for line in pages.splitlines() if line.startswith("::: ")}
