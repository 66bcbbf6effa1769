"""The page from a static host in Debian's Chromium, with a microphone that plays a file."""

import contextlib
import hashlib
import os
import re
import shutil

import browsing
import numpy as np
import pytest
import soundfile
from browsing import PATIENCE_MS, host, wait_for
from manifests import edit_manifest
from playwright.sync_api import expect

from u2moe.runtime import Bundle, DecodingOptions, EndpointConfig, Recognizer, TextFormat

pytestmark = [pytest.mark.slow, browsing.needs_chromium, browsing.needs_onnxruntime_web]


@pytest.fixture(scope="module")
def bundle(exported):
    """A bundle without experts, which pages load faster."""
    return Bundle.open(exported("dense_tiny"))


@pytest.fixture(scope="module")
def site(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "site"
    browsing.make_site(folder, bundle.path)
    return folder


@pytest.fixture(scope="module")
def browser(sound, tmp_path_factory):
    file = tmp_path_factory.mktemp("microphone") / "sound.wav"
    soundfile.write(file, np.tile(np.repeat(sound, 3), 3), 48_000)
    with browsing.chromium(*browsing.fake_microphone(file)) as browser:
        yield browser


@pytest.fixture
def page(new_page, site):
    """The page after loading its model."""
    with host(site) as url:
        page = new_page(url)
        page.wait_for_selector("body.ready")
        yield page


def reload(page):
    page.reload()
    page.wait_for_selector("body.ready")


def wait_until_ready(page):
    expect(page.locator("#status-text")).to_have_text("Ready", timeout=PATIENCE_MS)


def recognised(page, file):
    if page.locator("#clear").is_enabled():  # a reloaded page still has its transcript
        page.click("#clear")
    page.set_input_files("#file", file)
    page.wait_for_selector("#segments li")
    wait_until_ready(page)
    return page.locator(".word").all_inner_texts()


@pytest.fixture(scope="module")
def talk(sound, tmp_path_factory):
    file = tmp_path_factory.mktemp("talk") / "talk.wav"
    soundfile.write(file, sound, 16_000, subtype="PCM_16")
    return file


@pytest.fixture(scope="module")
def wanted(bundle, talk):
    """Words that Python recognises in `talk` with the options of the page."""
    options = DecodingOptions(chunk_size=16, num_left_chunks=4, endpoint=EndpointConfig(), text_format=TextFormat())
    segments = Recognizer(bundle, bundle.load(), options).transcribe(talk).segments
    return [word.word for segment in segments for word in segment.words]


KEPT = """async () => {
  const cache = await caches.open('u2moe'), requests = await cache.keys();
  const sizes = requests.map(async (request) => (await (await cache.match(request)).arrayBuffer()).byteLength);
  return requests.length === 5 && (await Promise.all(sizes)).every((size) => size > 9);
}"""
"""Whether the manifest and all files of the model are in the cache."""


def test_a_file_gives_what_python_gives_from_a_damaged_cache_on_a_phone_and_offline(new_page, site, talk, wanted):
    with host(site) as url:
        page = new_page(url, may_fail=True)
        page.wait_for_selector("body.ready")
        assert recognised(page, talk) == wanted
        expect(page.locator("#spoken")).to_have_attribute("aria-live", "polite")
        expect(page.locator("#spoken")).not_to_be_empty()
        page.evaluate("navigator.serviceWorker.ready")
        page.wait_for_function("navigator.serviceWorker.controller !== null")
        wait_for(page, KEPT)
        page.evaluate("""async () => {
          const cache = await caches.open('u2moe');
          const requests = (await cache.keys()).filter(({ url }) => url.includes('sha256'));
          for (const request of requests) await cache.put(request, new Response(new Uint8Array(9)));
        }""")
        reload(page)
        assert recognised(page, talk) == wanted
        wait_for(page, KEPT)
    page.click("#clear")
    page.set_viewport_size({"width": 320, "height": 640})
    page.emulate_media(color_scheme="dark")
    reload(page)
    lead, promise = (page.locator(name).bounding_box() for name in ("#lead", "#promise"))
    assert lead["x"] + lead["width"] / 2 == pytest.approx(promise["x"] + promise["width"] / 2, abs=1)
    assert recognised(page, talk) == wanted
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    buttons = re.findall(r"- button(.*)", page.locator("body").aria_snapshot())
    assert len(buttons) > 3
    assert all(re.match(r' "[^"]+"', name) for name in buttons), buttons


def test_a_new_model_and_a_new_page_under_the_old_names_are_noticed(new_page, site, talk, wanted, tmp_path):
    """Even if the browser may still use its HTTP cache. The service worker caches the new files."""
    folder = shutil.copytree(site, tmp_path / "site")

    def publish(file, change):
        later = file.stat().st_mtime + 10  # the host compares times in whole seconds
        file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")
        os.utime(file, (later, later))

    with host(folder, max_age=3600) as url:
        page = new_page(url, may_fail=True)  # reloading cancels a request
        page.wait_for_selector("body.ready")
        assert recognised(page, talk) == wanted
        page.wait_for_function("navigator.serviceWorker.controller !== null")
        tokens = folder / "model" / "tokens.txt"
        publish(tokens, lambda text: re.sub("(?m)(.) ([0-9]+)$", r"\1Q \2", text))
        content = tokens.read_bytes()
        digest = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        edit_manifest(tokens.parent, lambda manifest: manifest["files"].update({tokens.name: digest}))
        publish(tokens.parent / "bundle.json", str)
        reload(page)
        found = recognised(page, talk)
        assert found != wanted
        assert "".join(found).replace("Q", "") == "".join(wanted)
        publish(folder / "page.js", lambda text: text.replace("Press the microphone and speak.", "This page is new."))
        publish(folder / "service-worker.js", lambda text: re.sub("VERSION = '\\w+'", "VERSION = 'new'", text))
        page.reload()
        wait_for(page, "async () => (await caches.keys()).join() === 'u2moe,page-new'")
        page.reload()
        expect(page.locator("#lead")).to_have_text("This page is new.", timeout=PATIENCE_MS)


def test_the_microphone(page):
    """A suspended context is resumed, another device replaces a lost one, and failures of the audio thread and of
    starting are reported."""
    alert, status = page.get_by_role("alert"), page.locator("#status-text")
    page.evaluate("""() => {
      AudioContext = class extends AudioContext { opened = (window.context = this); };
      const { mediaDevices } = navigator, give = mediaDevices.getUserMedia.bind(mediaDevices);
      mediaDevices.getUserMedia = async (wanted) => (window.media = await give(wanted));
    }""")
    page.click("#microphone")
    page.wait_for_function("document.getElementById('partial').textContent.length > 0")
    expect(page.locator("#microphone")).to_have_attribute("aria-pressed", "true")
    page.wait_for_timeout(500)
    page.keyboard.press("m")
    page.wait_for_selector("#segments li .word")
    wait_until_ready(page)
    page.locator(".word").first.click()
    page.wait_for_selector(".word.playing")
    page.click("#microphone")
    expect(status).to_have_text("Listening", timeout=PATIENCE_MS)
    page.evaluate("context.suspend()")
    page.wait_for_function("context.state === 'running'")
    page.evaluate("media.getTracks().forEach((track) => track.dispatchEvent(new Event('ended')))")
    expect(alert).to_have_text(re.compile("The microphone is no longer available. Now using .+"))
    expect(status).to_have_text("Listening")
    page.click("#microphone")
    wait_until_ready(page)
    page.evaluate("""async () => {
      const source = await (await fetch('u2moe/capture.js')).text(), { addModule } = AudioWorklet.prototype;
      const broken = new Blob([source.replace('let sum = 0;', 'let sum = broken();')], { type: 'text/javascript' });
      AudioWorklet.prototype.addModule = function () { return addModule.call(this, URL.createObjectURL(broken)); };
    }""")
    page.click("#microphone")
    expect(alert).to_have_text("The microphone is no longer available.", timeout=PATIENCE_MS)
    wait_until_ready(page)
    page.evaluate("() => { AudioWorklet.prototype.addModule = async () => { throw new Error('no network'); }; }")
    for outcome, message in (
        ("throw new DOMException('', 'NotAllowedError')", "Access to the microphone was denied"),
        ("throw new DOMException('', 'NotFoundError')", "No microphone was found"),
        ("return new MediaStream()", "The microphone failed to start: no network"),
    ):
        page.evaluate(f"() => {{ navigator.mediaDevices.getUserMedia = async () => {{ {outcome}; }}; }}")
        page.click("#microphone")
        expect(alert).to_contain_text(message)


def test_what_was_recognised_outlives_the_recogniser_and_the_page(page, talk, wanted):
    words = page.locator(".word")
    assert recognised(page, talk) == wanted
    page.workers[0].evaluate("() => { BigInt64Array = null; }")  # no graph can run any more
    page.set_input_files("#file", talk)
    expect(page.get_by_role("alert")).to_have_text(re.compile("Recognition failed: .+ Start again "))
    page.set_input_files("#file", talk)
    expect(words).to_have_text(wanted * 2, timeout=PATIENCE_MS)
    wait_until_ready(page)
    reload(page)
    expect(words).to_have_text(wanted * 2)
    words.first.click()
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("minutes from the microphone can be played, until the page is reloaded.")
    page.set_input_files("#file", talk)
    expect(words).to_have_text(wanted * 3, timeout=PATIENCE_MS)
    starts = [float(start) for start in words.evaluate_all("all => all.map(({ dataset }) => dataset.start)")]
    assert starts == sorted(starts)
    wait_until_ready(page)
    page.click("#clear")
    reload(page)
    expect(words).to_have_count(0)


def damaged_digest(site):
    file = site / "model" / "bundle.json"
    content = file.read_text(encoding="utf-8")
    file.write_text(re.sub(r'(?<="sha256": ")\w{64}', "0" * 64, content), encoding="utf-8")


def without_simd(site):
    file = site / "worker.js"
    file.write_text("WebAssembly.validate = () => false;\n" + file.read_text(encoding="utf-8"), encoding="utf-8")


PROBLEMS = [
    (damaged_digest,
     r"does not match the manifest of the model. Load the model again; if that does not help, replace"),
    (lambda site: (site / "model" / "bundle.json").unlink(), "bundle.json: the server returned 404"),
    (lambda site: (site / "ort" / "ort-wasm-simd-threaded.wasm").unlink(), "onnxruntime failed to start: "),
    (lambda site: (site / "u2moe" / "source.js").unlink(), "Failed to fetch dynamically imported module"),
    (lambda site: (site / "worker.js").unlink(), "the worker failed: it did not start"),
    (lambda site: (site / "u2moe" / "core.wasm").unlink(), "core.wasm: the server returned 404"),
    (without_simd, "WebAssembly SIMD is not supported"),
]  # fmt: skip


def test_a_model_that_cannot_be_loaded(new_page, site, tmp_path):
    """Pages of several sites, each with a different fault, load concurrently."""
    with contextlib.ExitStack() as stack:
        pages = []
        for number, (damage, message) in enumerate(PROBLEMS):
            folder = shutil.copytree(site, tmp_path / str(number))
            damage(folder)
            pages.append((new_page(stack.enter_context(host(folder)), may_fail=True), message))
        for page, message in pages:
            whole = re.compile(f"The model cannot be loaded: .*{message}")
            expect(page.get_by_role("alert")).to_have_text(whole, timeout=PATIENCE_MS)
            expect(page.locator("#status-text")).to_have_text("Not loaded")
        page.wait_for_timeout(500)  # other files are still loading
        for page, _ in pages:
            expect(page.locator("#loaded")).to_have_text("Reload the page to try again.")
            assert page.locator("#microphone").is_disabled()


FILL = """async () => {
  const { Transcript } = await import('./transcript.js');
  const find = (id) => document.getElementById(id);
  find('empty').hidden = true;
  for (const id of ['segments', 'partial']) find(id).replaceWith(find(id).cloneNode());  // removes the listeners
  window.transcript = new Transcript(find('segments'), find('partial'), () => {});
  for (let index = 0; index < 400; index += 1) {
    const words = Array.from({ length: 12 }, (_, place) => (
      { word: `W${index}.${place}`, start: 9 * index + place / 2, end: 9 * index + place / 2 + 0.4, confidence: 0.9 }));
    const text = words.map(({ word }) => word).join(' ');
    transcript.add({ start: 9 * index, end: 9 * index + 6, text, words, confidence: 0.9 });
  }
}"""


LAID_OUT = (
    "[...document.querySelectorAll('#segments p')]"
    ".filter((each) => each.checkVisibility({ contentVisibilityAuto: true })).length"
)


def test_the_transcript_has_words_where_one_looks_and_the_sound_of_a_microphone_does_not_grow_without_end(page, talk):
    """Also: hotwords are those of the vocabulary, and a lost message ends the worker."""
    page.fill("#hotwords", "ẞ")
    page.set_input_files("#file", talk)
    expect(page.get_by_role("alert")).to_contain_text("the vocabulary has no")
    wait_until_ready(page)
    failure = page.evaluate("""async () => {
      const { Recognizer } = await import('./u2moe/worker.js');
      const worker = new Worker('worker.js', { type: 'module' }), loading = Recognizer.fromBundle('model/', { worker });
      worker.dispatchEvent(new MessageEvent('messageerror'));
      return loading.catch(({ message }) => message);
    }""")
    assert failure == "the worker failed: it did not start, or a message was lost"
    found = page.evaluate("""async () => {
      const { KEPT_S, RATE, Sound } = await import('./sound.js');
      const sound = new Sound(), size = () => sound.blocks.reduce((sum, block) => sum + block.length, 0) / RATE;
      const second = new Int16Array(RATE);
      for (let each = 0; each < 100; each += 1) sound.push(second.fill(each)); // a file
      const file = size();
      for (let each = 0; each < 2 * KEPT_S; each += 1) sound.push(second.fill(each), KEPT_S);
      const played = [];
      const heard = (seconds) => {
        const plays = sound.play(seconds, () => {});
        if (plays) played.push(Math.round(sound.source.buffer.getChannelData(0)[RATE] * 32768));
        sound.stop();
        return plays;
      };
      return {
        file, all: sound.duration, kept: size() - KEPT_S,
        heard: [0, KEPT_S + 80, KEPT_S + 102, 2 * KEPT_S + 50].map(heard), played,
      };
    }""")
    assert 0 <= found.pop("kept") <= 10
    assert found == {"file": 100, "all": 1300, "heard": [False, False, True, True], "played": [603, 1151]}
    page.evaluate(FILL)
    page.wait_for_function("document.querySelectorAll('.word').length < 1200")
    page.wait_for_function("document.querySelectorAll('.far').length > 300")
    page.wait_for_function(f"{LAID_OUT} < 100")
    assert page.locator("#segments li").count() == 400
    assert "W200.0 W200.1" in page.locator("#segments").text_content()
    expect(page.locator("#segments li").last).to_be_in_viewport()
    page.locator('.word[tabindex="0"]').focus()
    expect(page.locator(".word:focus")).to_have_text("W0.0")
    for key, word in (("ArrowRight", "W0.1"), ("End", "W399.11"), ("ArrowLeft", "W399.10"), ("Home", "W0.0")):
        page.keyboard.press(key)
        expect(page.locator(".word:focus")).to_have_text(word)
    page.wait_for_function("document.querySelectorAll('.word').length < 1200")
    page.evaluate("transcript.showPartial({ text: 'more', committed: '' })")
    expect(page.locator(".word:focus")).to_be_in_viewport()  # the page does not scroll away from earlier text
    page.evaluate("transcript.mark(9 * 200 + 0.6)")
    expect(page.locator(".word.playing")).to_have_text("W200.1")
    page.evaluate("getSelection().selectAllChildren(document.getElementById('segments'))")
    page.wait_for_function("getSelection().toString().includes('W100.0 W100.1')")  # the copied text is complete
