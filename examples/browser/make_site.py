"""Puts the page together, ready for any static host: the page, the module, onnxruntime-web and a model in ORT format.

npm ci --ignore-scripts
python make_site.py site [--model BUNDLE]
python -m http.server --directory site --bind 127.0.0.1
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

from u2moe.export.profiles.conversion import convert_bundle
from u2moe.runtime.places import DEMO_FOLDER
from u2moe.runtime.server import page

HERE = Path(__file__).parent
MODULE = HERE.parents[1] / "runtime" / "web"
ORT = HERE / "node_modules" / "onnxruntime-web" / "dist"
ORT_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
SHARED_FILES = ("capture.js", "controls.js", "favicon.svg", "formats.js", "page.css", "sound.js", "transcript.js")
"""Parts that this page has in common with that of the server, beside its footer."""


def make_site(out: Path, model: Path = DEMO_FOLDER) -> None:
    """Write the site into `out`, which is replaced."""
    if not ORT.is_dir():
        raise SystemExit(f"{ORT}: missing; run 'npm ci --ignore-scripts' in {HERE} first")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(HERE / "app", out)
    for file in MODULE.rglob("*.js"):
        copy = out / "u2moe" / file.relative_to(MODULE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    (out / "ort").mkdir()
    for name in ORT_FILES:
        shutil.copyfile(ORT / name, out / "ort" / name)
    server_page = Path(page.__path__[0])
    for name in SHARED_FILES:
        shutil.copyfile(server_page / name, out / name)
    footer = re.search(" *<footer>.*?</footer>", (server_page / "index.html").read_text(encoding="utf-8"), re.DOTALL)
    _fill_in(out / "index.html", footer=footer[0])
    _list_files(out)
    convert_bundle(model, out / "model", "ort")


def _list_files(out: Path) -> None:
    """Tell the service worker which files it keeps; another version of any of them is another version of the page."""
    worker = out / "service-worker.js"
    files = sorted(file for file in out.rglob("*") if file.is_file() and file != worker)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    names = ["./", *(file.relative_to(out).as_posix() for file in files)]
    _fill_in(worker, version=digest[:16], files=json.dumps(names))


def _fill_in(file: Path, **values: str) -> None:
    text = file.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"{{{{ {name} }}}}", value)
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Put the page together.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=DEMO_FOLDER, metavar="BUNDLE")
    arguments = parser.parse_args()
    make_site(arguments.out, arguments.model)
