"""Phrases that the style sheet of CONTRIBUTING rules out: `python tests/prose.py`, in `make lint`."""

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUOTING = {"CONTRIBUTING.md", "tests/prose.py"}
PATTERNS = {
    r"(?<!here )\b(?:is|are|was|were) no (?!longer|more|less|fewer|better|worse|further|such)\w": "is not a …",
    r"\b[Ww]hoever\b": "name who: the caller, the client",
    r"\bof which\b": "start a new sentence",
    r"(?:^|[.:;] )What (?![^.]*\?)": "name the thing",
    r"(?:^|[.:;] )(?:One|Those|That) (?:that|which|who|of which|whose)\b": "name the thing",
    r"\bin silence\b": "silently",
    r"\banew\b": "again",
    r"\b(?:is|are|was|were) told\b": "receives, is called with",
    r"\bat last\b": "finally",
    r"\bgoes first\b": "takes precedence",
}
"""What is found, and what to write instead. Few and sure: a pattern that ever needs an exception goes."""
_LITERAL = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`", re.DOTALL)
_CODE_BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def english(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line numbers and texts of what a file says in English: pages, comments, strings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in {tokenize.COMMENT, tokenize.STRING}:
                yield token.start[0], token.string.lstrip("rbf\"'# ")
    elif path.suffix in {".md", ".yml", ".html"}:
        yield 1, _CODE_BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)
    else:
        for literal in _LITERAL.finditer(text):
            yield text.count("\n", 0, literal.start()) + 1, literal[0].lstrip("/*\"'` ")


def findings(path: Path) -> Iterator[str]:
    """Yield a line for each turn of phrase in a file."""
    for line, text in english(path):
        for pattern, remedy in PATTERNS.items():
            for found in re.finditer(pattern, text, re.MULTILINE):
                place = line + text.count("\n", 0, found.start())
                yield f"{path.relative_to(ROOT)}:{place}: '{found[0].strip()}': {remedy}"


def main() -> int:
    """Print what is found in all files of the repository; return the exit status."""
    kinds = ["*.py", "*.md", "*.cpp", "*.hpp", "*.h", "*.js", "*.ts", "*.html", "*.yml"]
    listed = subprocess.run(["git", "ls-files", *kinds], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.split() if name not in QUOTING and "third_party" not in name]
    found = [line for path in paths for line in findings(path)]
    sys.stdout.writelines(f"{line}\n" for line in found)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
