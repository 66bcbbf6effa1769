"""Pages in Debian's Chromium, for tests."""

import contextlib
import time
from pathlib import Path

import pytest

from u2moe.benchmarks.studies.shared.programs import find_chromium

PATIENCE_MS = 120_000
"""How long anything may take before it counts as hanging: the machine may be busy."""
ROOT = Path(__file__).parents[2]
BROWSER = ROOT / "examples" / "browser"
WEB = ROOT / "runtime" / "web"
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
    contexts, problems = [], []

    def open_page(url, *, may_fail=False, **settings):
        context = browser.new_context(**{"permissions": ["microphone"], **settings})
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith((url, "blob:")) or problems.append(request.url))
        if not may_fail:
            page.on("requestfailed", lambda request: problems.append(request.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
