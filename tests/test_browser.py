"""The page in a browser, from a static host: Debian's Chromium with a microphone that plays a file."""

import functools
import http.server
import runpy
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from u2moe.runtime import DecodingOptions, EndpointConfig, Recognizer

BROWSER = Path(__file__).parents[1] / "examples" / "browser"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        not (BROWSER / "node_modules" / "onnxruntime-web").is_dir(),
        reason="needs onnxruntime-web: npm ci --ignore-scripts in examples/browser",
    ),
]
PATIENCE_MS = 120_000


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "site"
    runpy.run_path(str(BROWSER / "make_site.py"))["make_site"](folder, bundle.path)
    return folder


@pytest.fixture
def host(site):
    handler = functools.partial(QuietHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def browser(sound, tmp_path_factory):
    from playwright.sync_api import sync_playwright  # noqa: PLC0415

    file = tmp_path_factory.mktemp("microphone") / "sound.wav"
    soundfile.write(file, np.tile(np.repeat(sound, 3), 3), 48_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--use-fake-device-for-media-stream",
                "--use-fake-ui-for-media-stream",
                f"--use-file-for-fake-audio-capture={file}%noloop",
                "--autoplay-policy=no-user-gesture-required",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser, host):
    """The page, loaded; requests to other hosts and errors of scripts make the test fail."""
    context, problems = browser.new_context(permissions=["microphone"]), []
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    url = f"http://127.0.0.1:{host.server_port}/"
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: request.url.startswith((url, "blob:")) or problems.append(request.url))
    page.goto(url)
    page.wait_for_selector("body.ready")
    yield page
    context.close()
    assert not problems


def recognised(page, file):
    page.set_input_files("#file", file)
    page.wait_for_selector("#segments li")
    page.wait_for_function("document.getElementById('status-text').textContent === 'Ready'")
    return page.locator(".word").all_inner_texts()


@pytest.fixture
def talk(sound, tmp_path):
    soundfile.write(tmp_path / "talk.wav", sound, 16_000, subtype="PCM_16")
    return tmp_path / "talk.wav"


def expected_words(bundle, model, file):
    options = DecodingOptions(chunk_size=16, endpoint=EndpointConfig())
    segments = Recognizer(bundle, model, options).transcribe(file).segments
    return [word.word for segment in segments for word in segment.words]


def test_a_file_gives_what_python_gives_and_the_page_works_without_a_host(page, host, bundle, model, talk):
    wanted = expected_words(bundle, model, talk)
    assert recognised(page, talk) == wanted
    page.evaluate("navigator.serviceWorker.ready")
    page.wait_for_function("navigator.serviceWorker.controller !== null")
    host.shutdown()
    host.server_close()
    page.reload()
    page.wait_for_selector("body.ready")
    assert recognised(page, talk) == wanted


def test_a_damaged_cache_is_read_again(page, bundle, model, talk):
    damage = """async () => {
      const cache = await caches.open('u2moe');
      const requests = (await cache.keys()).filter(({ url }) => url.includes('sha256'));
      for (const request of requests) await cache.put(request, new Response(new Uint8Array(9)));
      return requests.length;
    }"""
    assert page.evaluate(damage) == 5
    page.reload()
    page.wait_for_selector("body.ready")
    assert recognised(page, talk) == expected_words(bundle, model, talk)


def test_the_microphone(page):
    page.click("#microphone")
    page.wait_for_function("document.getElementById('partial').textContent.length > 0")
    page.wait_for_timeout(2000)
    page.click("#microphone")
    page.wait_for_selector("#segments li .word")
    page.wait_for_function("document.getElementById('status-text').textContent === 'Ready'")
    page.locator(".word").first.click()
    page.wait_for_selector(".word.playing")


def test_a_model_that_cannot_be_loaded(browser, host, site):
    file = site / "model" / "bundle.json"
    content = file.read_text(encoding="utf-8")
    file.write_text(content.replace('"sha256": "', '"sha256": "0'), encoding="utf-8")
    try:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{host.server_port}/")
        page.wait_for_function("document.getElementById('problem').textContent.includes('sha256 is')")
    finally:
        file.write_text(content, encoding="utf-8")
