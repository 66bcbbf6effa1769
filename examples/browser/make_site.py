"""Assemble the site for static hosts: page, module, onnxruntime-web and a model in ORT format.

npm ci --ignore-scripts
python make_site.py site [--model BUNDLE]
python -m http.server --directory site --bind 127.0.0.1
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

from u2moe.export.profiles.conversion import convert_bundle
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.server import page

HERE = Path(__file__).parent
MODULE = HERE.parents[1] / "runtime" / "web"
ORT = HERE / "node_modules" / "onnxruntime-web" / "dist"
ORT_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
OF_THE_SERVER = ("connection.js", "openapi.json", "page.js", "upload.js")
"""Files of the server's page that this site does not use."""


def make_site(out: Path, model: Path = DEMO_FOLDER) -> None:
    """Write the site to `out`, replacing it."""
    if not ORT.is_dir():
        raise SystemExit(f"{ORT}: missing; run 'npm ci --ignore-scripts' in {HERE} first")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    served = [file for file in Path(page.__path__[0]).iterdir() if file.name not in OF_THE_SERVER]
    files = {file.name: file for file in served if file.suffix in (".html", ".css", ".js", ".svg")}
    files |= {file.name: file for file in (HERE / "app").iterdir()}
    files |= {f"ort/{name}": ORT / name for name in ORT_FILES}
    files |= {f"u2moe/{file.name}": file for file in MODULE.iterdir() if file.suffix in (".js", ".wasm")}
    for folder in ("ort", "u2moe"):
        (out / folder).mkdir()
    for name, file in files.items():
        shutil.copyfile(file, out / name)
    _list_files(out)
    convert_bundle(model, out / "model", "ort")


def _list_files(out: Path) -> None:
    """Write the list of files into the service worker, with a version that changes if any file changes."""
    worker = out / "service-worker.js"
    files = sorted(file for file in out.rglob("*") if file.is_file() and file != worker)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    names = ["./", *(file.relative_to(out).as_posix() for file in files)]
    text = worker.read_text(encoding="utf-8").replace("{{ version }}", digest[:16])
    worker.write_text(text.replace("{{ files }}", json.dumps(names)), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Assemble the page for a static host.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=DEMO_FOLDER, metavar="BUNDLE")
    arguments = parser.parse_args()
    make_site(arguments.out, arguments.model)
