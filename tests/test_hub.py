"""Downloads and uploads of bundles with a local server that has the hub's API, including interruptions and changes."""

import base64
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import pytest

from u2moe.runtime import BundleError, Recognizer, bundle_location

PROGRAM = """\
import sys, time
from u2moe import Recognizer
from u2moe.runtime import cli
time.sleep = lambda _: None  # the client waits before it tries again
for line in sys.stdin:
    place, *arguments = line.split()
    name, _, revision = place.partition("@")
    try:
        code = cli.main([name, *arguments]) if arguments else None
        print(Recognizer.from_pretrained(name, revision=revision or None).bundle.path.name if code is None else code)
    except Exception as error:
        print(type(error).__name__, error, sep=": ")
    print("\\nend", flush=True)
"""


@pytest.fixture
def hub(bundle):
    """Serve a repository "org/name" with the files of a bundle. Tests may change `files`; `limit` truncates responses.
    A push replaces the files, unless it `breaks`."""

    class Hub(BaseHTTPRequestHandler):
        files = {file.name: file.read_bytes() for file in bundle.path.iterdir() if file.is_file()}  # noqa: RUF012
        limit, breaks = None, False

        def log_message(self, *_):
            pass

        def answer(self, body, code=200, **headers):
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
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

        def do_POST(self):
            body, kind = self.rfile.read(int(self.headers["Content-Length"])), self.path.split("/")[-2]
            if self.path == "/api/repos/create":
                found = {"url": f"{address}/org/name"}
            elif kind == "preupload":
                names = [file["path"] for file in json.loads(body)["files"]]
                found = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            elif kind == "commit" and not self.breaks:
                files = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
                Hub.files = {file["path"]: base64.b64decode(file["content"]) for file in files}
                found = {"commitUrl": f"{address}/org/name/commit/{'a' * 40}", "commitOid": "a" * 40}
            else:
                found = {}
            code = 403 if self.breaks and kind == "commit" else 200
            self.answer(json.dumps(found).encode(), code, Content_Type="application/json")

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Hub, address
        server.shutdown()


@contextlib.contextmanager
def client(address, home, **environment):
    """Yield a function that fetches a bundle or runs a command in a child process, which reads `environment` once."""
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    pipe, command, settings = subprocess.PIPE, [sys.executable, "-c", PROGRAM], {**os.environ, **settings}
    with subprocess.Popen(command, env=settings, text=True, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT) as child:

        def run(*words):
            print(*words, file=child.stdin, flush=True)
            return "".join(itertools.takewhile(lambda line: line != "end\n", iter(child.stdout.readline, ""))).strip()

        yield run
        child.stdin.close()


@pytest.mark.skipif(find_spec("huggingface_hub") is None, reason="needs the extra hub")
@pytest.mark.slow
def test_a_bundle_is_fetched_and_kept_and_pushed_whole_or_not_at_all(hub, bundle, tmp_path):
    """A push adds a card if there is none and is one commit, from which the same bundle can be loaded."""
    server, address = hub
    told = "BundleError: {}: is not a local folder, and cannot be fetched from the hub: "
    with client(address, tmp_path / "home", HF_TOKEN="hf_any") as run:
        server.limit = 1000
        assert told.format("org/name") in run("org/name")
        server.limit = None
        assert run("org/name").endswith("org--name")  # fetches missing files
        assert told.format("org/other") in run("org/other")
        server.files["tokens.txt"] = server.files["tokens.txt"][:-1] + b" "  # same size
        assert "IntegrityError: " in run("org/name@v2")
        before, server.breaks = dict(server.files), True
        found = run("push", bundle.path, "org/name@v1")
        assert "error: org/name@v1: cannot be published: " in found
        assert found.endswith("\n1")
        assert server.files == before
        server.breaks = False
        found = run("push", bundle.path, "org/name@v1")
        assert f"{address}/org/name/commit/aaaa" in found
        assert found.endswith("\n0")
        card = server.files["README.md"].decode()
        assert card.startswith("---\nlibrary_name: u2moe\npipeline_tag: automatic-speech-recognition\n")
        assert "conformer of 3 blocks with 8 experts with CTC and attention (bitransformer), for streams and" in card
        assert "u2moe transcribe --model org/name@v1 talk.mp3" in card
        assert run("org/name@v1").endswith("org--name@v1")
        server.files["README.md"] = b"the author's own"
        assert "README.md" not in (run("push", bundle.path, "org/name@v1"), server.files)[1]
        damaged = shutil.copytree(bundle.path, tmp_path / "damaged")
        (damaged / "tokens.txt").write_bytes((damaged / "tokens.txt").read_bytes()[:-1] + b" ")
        assert "tokens.txt" in run("push", damaged, "org/name@v1")
        assert run("push", bundle.path, "name").endswith("\n1")
    with client(address, tmp_path / "home", HF_HUB_OFFLINE="1") as run:
        assert run("org/name@v1").endswith("org--name@v1")


def test_without_the_client_the_extra_is_named_and_paths_are_no_repositories(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BundleError, match=r"org/name: no such folder; to .* hub, run pip install '\.\[hub\]'"):
        Recognizer.from_pretrained("org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(bundle_location.find_bundle("org/name")) == os.path.join("org", "name")  # noqa: PTH118 - a folder takes precedence
    paths = ("bundle", "/exp/bundle", "./bundle", "a/b/c", "../bundle", "org/name@")
    assert not any(map(bundle_location.is_repository, paths))
