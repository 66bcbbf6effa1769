"""Hooks of mkdocs that replace marks in pages, so that nothing is written twice.

`{{ page FILE }}` becomes a page from elsewhere, such as the README. `{{ packages }}` becomes tables of all packaged
files with the first paragraphs of their docstrings. `{{ help COMMAND }}` becomes the output of `u2moe COMMAND --help`.
`{{ options PLACE }}` becomes rows of a table of declared options.
"""

import ast
import atexit
import contextlib
import html
import importlib
import io
import json
import os
import re
import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

from mkdocs.plugins import event_priority

from u2moe.runtime import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MARK = re.compile(r"^\{\{ (\w+) ?([\w./ ]*) \}\}$", re.MULTILINE)
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>(?!\w+:)[^)#]+)(?P<anchor>#[^)]*)?\)")
ORDER = ("runtime", "export", "quantize", "benchmarks")
HELP_WIDTH = "100"


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: Any) -> None:
    """Let mkdocstrings read this clone instead of an installed u2moe, through links arranged like the packages."""
    tree = Path(tempfile.mkdtemp(prefix="u2moe-docs-"))
    atexit.register(shutil.rmtree, tree)
    (tree / "u2moe").mkdir()
    for package, folder in package_folders().items():
        inside = [ROOT / folder] if package.count(".") == 1 else sorted((ROOT / folder).glob("*.py"))
        for target in inside if package.count(".") <= 1 else ():
            (tree / "u2moe" / target.name).symlink_to(target)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(tree)]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page. mkdocs calls this for each page."""
    return MARK.sub(lambda match: filled(match[1], match[2]), markdown)


def filled(mark: str, argument: str) -> str:
    """Return the replacement of a mark."""
    if mark == "help":
        return help_of(argument)
    if mark == "packages":
        folders = [folder for folder in package_folders().values() if len(list((ROOT / folder).glob("*.py"))) > 1]
        folders.sort(key=lambda folder: (ORDER.index(folder.split("/")[0]), folder))
        return "\n\n".join(files_of(folder) for folder in folders)
    if mark == "options":
        return options_in(argument)
    return page_of(ROOT / argument)


def options_in(place: str) -> str:
    """Return the rows of an options table: name, meaning, default. `place` is MODULE.OPTIONS, a mapping by name."""
    module, _, name = place.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    rows = []
    for name, each in found.items():
        about = f"{each.about}: {', '.join(each.choices)}" if each.kind == "choice" else each.about
        rows.append(f"| `{name}` | {about} | {each.otherwise or f'`{json.dumps(each.default)}`'} |")
    return "\n".join(rows)


def page_of(file: Path) -> str:
    """Return a page from outside docs/. Links into docs/ become links within the site; other links become text."""

    def link(match: re.Match[str]) -> str:
        target = (file.parent / match["target"]).resolve()
        if not target.is_relative_to(DOCS):
            return match["text"]
        return f"[{match['text']}]({target.relative_to(DOCS).as_posix()}{match['anchor'] or ''})"

    return LINK.sub(link, file.read_text(encoding="utf-8"))


def package_folders() -> dict[str, str]:
    """Return the folder of each package by name, from pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders: dict[str, str] = settings["tool"]["setuptools"]["package-dir"]
    return folders


def files_of(folder: str) -> str:
    """Return a table of the modules of a folder, such as runtime, with their summaries."""
    modules = [file for file in sorted((ROOT / folder).glob("*.py")) if file.name != "__init__.py"]
    rows = [f"| `{file.name}` | {summary(file)} |" for file in modules]
    head = [f"## {folder}/", summary(ROOT / folder / "__init__.py"), "", "| file | purpose |", "| --- | --- |"]
    return "\n".join([*head, *rows])


def summary(file: Path) -> str:
    """Return the first paragraph of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{file}: has no docstring")
    return docstring.partition("\n\n")[0].replace("\n", " ").replace("|", r"\|")


def help_of(command: str) -> str:
    """Return the output of `u2moe COMMAND --help` as a collapsed section."""
    plain = mock.patch.dict(os.environ, COLUMNS=HELP_WIDTH, NO_COLOR="1")
    with plain, contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            cli.main([*command.split(), "--help"])
        except SystemExit as end:
            if end.code:  # the page names a command that does not exist
                raise
    summary = f"<summary>All options: <code>u2moe {command} --help</code></summary>"
    return f"<details>{summary}<pre><code>{html.escape(printed.getvalue())}</code></pre></details>"
