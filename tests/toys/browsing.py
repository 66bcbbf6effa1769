"""Pages in Debian's Chromium, and modules of runtime/web in Node."""

import contextlib
import functools
import http.server
import json
import runpy
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

PATIENCE_MS = 120_000
"""Maximum time of any step in ms before it counts as hanging."""
ROOT = Path(__file__).parents[2]
BROWSER = ROOT / "examples" / "browser"
WEB = ROOT / "runtime" / "web"

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_onnxruntime_web = pytest.mark.skipif(
    not (BROWSER / "node_modules" / "onnxruntime-web").is_dir(),
    reason="needs onnxruntime-web: npm ci --ignore-scripts in examples/browser",
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")


def wait_for(page, question):
    """Wait until a JavaScript function's promise resolves to true; `page.wait_for_function` accepts any promise."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(question):
        assert time.monotonic() < deadline, question
        page.wait_for_timeout(50)


@contextlib.contextmanager
def opened_pages(browser):
    """A function from a URL to its page. The test fails on requests to other hosts, script errors and, unless
    `may_fail`, unanswered requests."""
    contexts, problems, is_closing = [], [], False

    def open_page(url, *, may_fail=False, **settings):
        allowed = ["microphone", "clipboard-read", "clipboard-write"]
        context = browser.new_context(**{"permissions": allowed, **settings})
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith((url, "blob:")) or problems.append(request.url))
        if not may_fail:
            page.on("requestfailed", lambda request: is_closing or problems.append(request.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.cookies()  # its response ensures that earlier failures are known
    is_closing = True  # closing aborts pending requests, such as the rest of an upload
    for context in contexts:
        context.close()
    assert not problems, problems


def make_site(site, bundle):
    """Assemble the page; see examples/browser/make_site.py."""
    runpy.run_path(str(BROWSER / "make_site.py"))["make_site"](site, bundle)


@contextlib.contextmanager
def host(folder, *, max_age=None):
    """Host a folder statically and yield its URL. Browsers may cache responses for `max_age` seconds."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def end_headers(self):
            if max_age is not None:
                self.send_header("Cache-Control", f"max-age={max_age}")
            super().end_headers()

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def fake_microphone(file, *, again=False):
    """Return arguments for Chromium: a permitted microphone that plays a WAV file once or repeatedly."""
    played = f"--use-file-for-fake-audio-capture={file}{'' if again else '%noloop'}"
    fake = [f"--use-fake-{each}-for-media-stream" for each in ("device", "ui")]
    return [*fake, played, "--autoplay-policy=no-user-gesture-required"]


@contextlib.contextmanager
def chromium(*arguments):
    """Run the system's Chromium, without a window."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - needed only by tests of pages

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *arguments])
        yield browser
        browser.close()


NODE = shutil.which("node")
_PRELUDE = f"""
const input = JSON.parse(await new Response(process.stdin).text());
const part = (file) => import({json.dumps(WEB.as_uri())} + "/" + file);
"""
needs_node = pytest.mark.skipif(NODE is None, reason="needs Node: apt-get install nodejs")


def run_module(code, data=None, *flags):
    """Return the JSON output of a module that reads `input`; `part` imports a file of the package."""
    command = [NODE, *flags, "--input-type=module", "-e", f"{_PRELUDE}\n{code}"]
    done = subprocess.run(
        command, input=json.dumps(data), cwd=BROWSER, capture_output=True, text=True, check=False,
        timeout=PATIENCE_MS / 1000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
