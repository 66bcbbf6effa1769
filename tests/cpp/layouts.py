"""Print offsets, sizes, codes and functions of u2moe.h: python tests/cpp/layouts.py [INCLUDE FOLDER] > layouts.json."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def layouts(include: Path, folder: Path) -> dict[str, dict[str, int]]:
    """Return the layouts that a compiler gives a header on a 64-bit machine. Compiles in a folder."""
    header = re.sub(r"/\*.*?\*/", "", (include / "u2moe.h").read_text(encoding="utf-8"), flags=re.DOTALL)
    functions = dict.fromkeys(sorted(re.findall(r"^U2MOE_API [\w *]*?\b(u2moe_\w+)\(", header, re.MULTILINE)), 1)
    lines = []
    for name, body in re.findall(r"typedef struct (\w+) \{(.*?)\} \1;", header, re.DOTALL):
        lines.append(f'printf("sizes {name} %zu\\n", sizeof({name}));')
        for member in filter(str.strip, body.split(";")):
            pointer = re.search(r"\(\*(\w+)\)\(", member)
            names = (
                [pointer[1]]
                if pointer
                else [re.search(r"(\w+)(\[\d+\])?$", each.strip())[1] for each in member.split(",")]
            )
            lines += [f'printf("{name} {each} %zu\\n", offsetof({name}, {each}));' for each in names]
    codes = re.findall(r"(U2MOE_\w+) = \d+", header)
    lines += [f'printf("codes {code} %d\\n", (int){code});' for code in codes]
    source = folder / "layouts.c"
    source.write_text(f"#include <stdio.h>\n#include <u2moe.h>\nint main(void) {{\n{chr(10).join(lines)}\n}}\n")
    subprocess.run(["cc", f"-I{include}", source, "-o", folder / "layouts"], check=True)
    printed = subprocess.run([folder / "layouts"], capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, int]] = {"functions": functions}
    for line in printed.splitlines():
        kind, name, number = line.split()
        found.setdefault(kind, {})[name] = int(number)
    return found


if __name__ == "__main__":
    own = Path(__file__).parents[2] / "runtime" / "cpp" / "include"
    include, folder = map(Path, sys.argv[1:3]) if len(sys.argv) > 1 else (own, Path(tempfile.mkdtemp()))
    sys.stdout.write(json.dumps(layouts(include, folder), indent=1) + "\n")
