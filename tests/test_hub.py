"""Bundles from a hub: a server on this machine that speaks the hub's API, whole, broken off, changed and absent."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import pytest

from u2moe.runtime import BundleError, Recognizer, places
from u2moe.runtime.hub import is_repository

needs_client = pytest.mark.skipif(find_spec("huggingface_hub") is None, reason="needs the extra hub")
PROGRAM = "import sys; from u2moe import Recognizer; print(Recognizer.from_pretrained(sys.argv[1]).bundle.path.name)"


@pytest.fixture
def hub(bundle):
    """A repository "org/name" with the files of a bundle; `files` may be changed, `limit` cuts answers off."""

    class Hub(BaseHTTPRequestHandler):
        files = {file.name: file.read_bytes() for file in bundle.path.iterdir() if file.is_file()}  # noqa: RUF012
        limit = None

        def log_message(self, *_):
            pass

        def answer(self, body, code=200, **headers):
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body if Hub.limit is None else body[: Hub.limit])

        def do_GET(self):
            place = self.path.partition("?")[0].strip("/").split("/")
            names = [{"type": "file", "path": name, "size": len(self.files[name]), "oid": "0"} for name in self.files]
            if place[:4] == ["api", "models", "org", "name"]:
                whole = {"id": "org/name", "sha": "a" * 40, "siblings": [{"rfilename": name} for name in self.files]}
                self.answer(json.dumps(names if "tree" in place else whole).encode(), Content_Type="application/json")
            elif place[:3] == ["org", "name", "resolve"] and place[-1] in self.files:
                content = self.files[place[-1]]
                tag = hashlib.sha256(content).hexdigest()
                self.answer(content, ETag=f'"{tag}"', X_Repo_Commit="a" * 40)
            else:
                self.answer(b"", 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET  # noqa: N815

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Hub, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run(address, home, name, **environment):
    """In a process of its own, as the client reads its environment when it is imported."""
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    command = [sys.executable, "-c", PROGRAM, name]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)


@needs_client
@pytest.mark.slow
def test_a_bundle_comes_from_a_hub_and_is_kept(hub, tmp_path):
    server, address = hub
    done = run(address, tmp_path, "org/name@v1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "org--name@v1\n"
    again = run(address, tmp_path, "org/name@v1", HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout
    tokens = server.files["tokens.txt"]
    server.files["tokens.txt"] = tokens[:-1] + b" "  # of the same size
    done = run(address, tmp_path, "org/name")
    assert done.returncode == 1
    assert "IntegrityError" in done.stderr


@needs_client
@pytest.mark.slow
def test_what_breaks_off_or_is_not_there_is_an_error(hub, tmp_path):
    server, address = hub
    server.limit = 1000
    done = run(address, tmp_path, "org/name")
    assert "BundleError: org/name: no such folder, and cannot be fetched from the hub: " in done.stderr
    server.limit = None
    assert run(address, tmp_path, "org/name").returncode == 0  # what is missing is fetched
    done = run(address, tmp_path, "org/other")
    assert "BundleError: org/other: no such folder, and cannot be fetched from the hub: " in done.stderr


def test_without_the_client_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BundleError, match=r"org/name: no such folder; for .* hub: pip install '\.\[hub\]'"):
        Recognizer.from_pretrained("org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(places.find_bundle("org/name")) == os.path.join("org", "name")  # noqa: PTH118 - a folder goes first


@pytest.mark.parametrize("name", ["bundle", "/exp/bundle", "./bundle", "a/b/c", "../bundle", "org/name@"])
def test_paths_are_no_repositories(name):
    assert not is_repository(name)
