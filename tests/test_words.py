"""Class names are unique, and docs/how/words.md explains each word once."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_no_two_public_classes_share_a_name_and_words_are_explained_once():
    places = defaultdict(list)
    for top in ("export", "quantize", "runtime", "benchmarks"):
        for file in (ROOT / top).rglob("*.py"):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(str(file.relative_to(ROOT)))
    assert len(places) > 100
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
    page = (ROOT / "docs" / "how" / "words.md").read_text(encoding="utf-8")
    words = re.findall(r"^\| \*\*([a-z ]+)\*\* \| [A-Z`].*\. \|$", page, re.MULTILINE)
    assert len(words) == len(set(words)) == page.count("| **")
    assert len(words) <= 40, "keep the glossary short"
