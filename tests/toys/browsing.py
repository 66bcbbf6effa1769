"""Pages in Debian's Chromium, for tests."""

import contextlib
import functools
import http.server
import runpy
import shutil
import threading
import time
from pathlib import Path

import pytest

PATIENCE_MS = 120_000
"""How long anything may take before it counts as hanging: the machine may be busy."""
ROOT = Path(__file__).parents[2]
BROWSER = ROOT / "examples" / "browser"
WEB = ROOT / "runtime" / "web"


def find_chromium():
    """The system's Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


needs_onnxruntime_web = pytest.mark.skipif(
    not (BROWSER / "node_modules" / "onnxruntime-web").is_dir(),
    reason="needs onnxruntime-web: npm ci --ignore-scripts in examples/browser",
)
needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="needs a Chromium: apt-get install chromium")


def wait_for(page, question):
    """Until a function in JavaScript has a promise of true: `page.wait_for_function` takes any promise for a yes."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(question):
        assert time.monotonic() < deadline, question
        page.wait_for_timeout(50)


@contextlib.contextmanager
def opened_pages(browser):
    """A function from a URL to its page. Other hosts, errors of scripts, and unless they may fail requests without an
    answer, make the test fail."""
    contexts, problems, is_closing = [], [], False

    def open_page(url, *, may_fail=False, **settings):
        context = browser.new_context(
            **{"permissions": ["microphone", "clipboard-read", "clipboard-write"], **settings}
        )
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
        context.cookies()  # by its answer what has failed before is known
    is_closing = True  # which ends requests that are still under way, such as the rest of an upload
    for context in contexts:
        context.close()
    assert not problems, problems


def make_site(site, bundle):
    """Put the page together; see examples/browser/make_site.py."""
    runpy.run_path(str(BROWSER / "make_site.py"))["make_site"](site, bundle)


@contextlib.contextmanager
def host(folder, *, max_age=None):
    """A static host for a folder, with its URL. It lets browsers keep answers for `max_age` seconds without asking."""

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
    """Arguments for Chromium: a microphone that plays a WAV file once or again and again, and that pages are given."""
    return [
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={file}{'' if again else '%noloop'}",
        "--autoplay-policy=no-user-gesture-required",
    ]


@contextlib.contextmanager
def chromium(*arguments):
    """The system's Chromium, without a window."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - of tests of pages alone

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox", *arguments])
        yield browser
        browser.close()
