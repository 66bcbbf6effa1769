"""The server's page in Debian's Chromium, with a microphone that plays a file."""

import dataclasses
import json
import re
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
from browsing import PATIENCE_MS, chromium, fake_microphone, needs_chromium
from playwright.sync_api import expect
from tones import toy_recognizer

from u2moe.runtime import DecodingOptions, Result, TextFormat, Transcript, format_transcript
from u2moe.runtime.result import WordResult
from u2moe.runtime.server.scheduler import ServedStream

pytestmark = needs_chromium
WRITTEN = DecodingOptions(text_format=TextFormat())


@pytest.fixture(scope="module")
def browser(tmp_path_factory, speech):
    """Return a browser whose microphone plays speech once at 48 kHz, then silence."""
    file = tmp_path_factory.mktemp("microphone") / "speech.wav"
    soundfile.write(file, np.concatenate([np.zeros(24_000, np.int16), speech(48_000)]), 48_000)
    with chromium(*fake_microphone(file)) as browser:
        yield browser


@pytest.fixture
def page(new_page, server):
    return new_page(server.url)


def wait_for_segments(page, count):  # or more, on a busy machine
    expect(page.locator("#segments li").nth(count - 1)).to_be_attached(timeout=PATIENCE_MS)


def wait_for_status(page, text):
    expect(page.locator("#status-text")).to_have_text(text, timeout=PATIENCE_MS)


def recognise(page, talk):
    page.set_input_files("#file", talk)
    wait_for_segments(page, 3)
    wait_for_status(page, "Ready")


def test_a_file_is_recognised_as_by_the_command_line_and_can_be_saved(page, demo, talk):
    transcript = demo.transcribe(talk, options=WRITTEN)
    wanted = transcript.segments
    recognise(page, talk)
    assert page.locator(".word").all_inner_texts() == [word.word for segment in wanted for word in segment.words]
    for kind in ("txt", "srt", "vtt", "json"):
        page.click("summary")
        with page.expect_download() as download:
            page.click(f'[data-format="{kind}"]')
        assert download.value.suggested_filename == f"transcript.{kind}"
        text = download.value.path().read_text(encoding="utf-8")
        if kind == "txt":
            assert text == "".join(f"{segment.text}\n" for segment in wanted)
        elif kind == "json":
            saved = json.loads(text)["segments"]
            assert [word["start"] for word in saved[1]["words"]] == [word.start for word in wanted[1].words]
        else:
            assert text == format_transcript(transcript, kind)
    page.click("#copy")
    expect(page.locator("#copy")).to_have_text("Copied")
    lines = "\n".join(segment.text for segment in wanted)
    assert page.evaluate("navigator.clipboard.readText()") == lines
    page.keyboard.press("Control+a")
    assert page.evaluate("getSelection().toString().split(/\\s+/).join(' ').trim()") == lines.replace("\n", " ")
    page.locator(".word").first.focus()
    page.keyboard.press("ArrowRight")
    second = page.locator(".word").nth(1)
    expect(second).to_be_focused()
    assert re.fullmatch(r"[\d.]+ to [\d.]+ s, \d+ % sure", second.get_attribute("title"))
    page.keyboard.press("Enter")
    expect(page.locator(".word.playing")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator(".word.playing")).to_have_count(0)
    page.click("#clear")
    expect(page.locator("#empty")).to_be_visible()


NUMBERS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
CUES = [
    ("a b", [("a", 0.0, 0.2), ("b", 5.0, 5.2)]),
    (NUMBERS, [(word, 10 + 0.31 * index, 10.3 + 0.31 * index) for index, word in enumerate(NUMBERS.split())]),
    ("\u4f60\u597d \u4e16\u754c", [("\u4f60\u597d", 50.0, 50.4), ("\u4e16\u754c", 50.5, 51.0)]),
]


def test_subtitles_are_cut_as_by_the_server(page):
    segments = []
    for number, (text, timed) in enumerate(CUES):
        words = [WordResult(word=word, start=start, end=end, confidence=1.0) for word, start, end in timed]
        segments.append(Result(text=text, is_final=True, segment=number, words=words))
    script = "async (given) => (await import('./formats.js')).format(given, 'srt')"
    given = [dataclasses.asdict(segment) for segment in segments]
    transcript = Transcript(text="", segments=segments, duration=60.0)
    assert page.evaluate(script, given) == format_transcript(transcript, "srt")


def test_a_model_is_chosen_where_there_are_several(new_page, page, running, demo, talk):
    expect(page.locator("#model-field")).to_be_hidden()
    tones = toy_recognizer()
    with running({"english": demo, "tones": tones}) as server:
        page = new_page(server.url, may_fail=True)  # it may be closed during a response
        page.locator("#model").select_option("tones")
        tones.segments, tones.create_stream = Mock(wraps=tones.segments), Mock(wraps=tones.create_stream)
        page.set_input_files("#file", talk)
        server.wait_until(lambda: tones.segments.called)
        wait_for_status(page, "Ready")
        expect(page.locator("#model")).to_have_value("tones")
        page.click("#microphone")
        server.wait_until(lambda: tones.create_stream.called)
        page.close()
        server.wait_until_empty()


def test_a_file_can_be_cancelled(new_page, running, held, talk):
    with running(held) as server:
        page = new_page(server.url, may_fail=True)
        page.set_input_files("#file", talk)
        expect(page.locator("#status-text")).to_contain_text("Recognising talk.wav", timeout=PATIENCE_MS)
        expect(page.locator("#microphone")).to_be_disabled()
        page.get_by_role("button", name="Cancel").click()
        wait_for_status(page, "Ready")
        expect(page.locator("#cancel")).to_be_hidden()
        held.release()
        server.wait_until_empty()


@pytest.fixture
def fed(monkeypatch):
    sources = {}
    feed = ServedStream.feed

    async def record(session, samples):
        sources.setdefault(session, []).append(samples)
        await feed(session, samples)

    monkeypatch.setattr(ServedStream, "feed", record)
    return sources


def texts_of(page):
    return [" ".join(item.locator(".word").all_inner_texts()) for item in page.locator("#segments li").all()]


def expected_texts(demo, server, blocks):
    options = dataclasses.replace(server.service.default.stream_options, text_format=TextFormat())
    return [segment.text for segment in demo.transcribe(np.concatenate(blocks), options=options).segments]


def test_the_microphone(page, demo, server, fed):
    page.click("#microphone")
    wait_for_status(page, "Listening")
    expect(page.locator("#partial")).not_to_be_empty(timeout=PATIENCE_MS)
    wait_for_segments(page, 2)
    page.keyboard.press("m")
    wait_for_status(page, "Ready")
    (blocks,) = fed.values()
    assert texts_of(page) == expected_texts(demo, server, blocks)
    assert len(texts_of(page)) >= 2  # sound lost on a busy machine may leave an extra word
    server.wait_until_empty()


HOLD_ALL = """() => {
  // Blocks are never full, so the audio thread keeps all samples.
  const { addModule } = AudioWorklet.prototype;
  AudioWorklet.prototype.addModule = async function (url) {
    const script = (await (await fetch(url)).text()).replace(/(?<=BLOCK_LEN = ).*?;/, '2 ** 24;');
    return addModule.call(this, URL.createObjectURL(new Blob([script], { type: 'text/javascript' })));
  };
  window.heard = { blocks: 0, last: 0 };
  window.AudioWorkletNode = class extends AudioWorkletNode {
    constructor(context, ...given) {
      super(context, ...given);
      heard.rate = context.sampleRate;
      this.port.addEventListener('message', ({ data }) => {
        if (data.isLast) heard.last += data.samples.length;
        else heard.blocks += 1;
      });
    }
  };
}"""


def test_the_last_moment_of_the_microphone(new_page, demo, server, fed):
    """Samples that the audio thread and the resampler still hold when the microphone stops are recognised."""
    page = new_page(server.url, bypass_csp=True)  # for the changed script
    page.evaluate(HOLD_ALL)
    page.click("#microphone")
    wait_for_status(page, "Listening")
    page.wait_for_timeout(1500)  # the first words
    page.click("#microphone")
    wait_for_status(page, "Ready")
    heard = page.evaluate("heard")
    assert heard["blocks"] == 0
    assert heard["last"] > heard["rate"]
    samples = np.concatenate([block for blocks in fed.values() for block in blocks])
    assert len(samples) == round(heard["last"] * 16_000 / heard["rate"])
    assert texts_of(page) == expected_texts(demo, server, [samples])


def test_a_server_that_goes_and_comes_back(new_page, demo, running, fed):
    """Final results stay, other audio is sent again, and nothing is recognised twice."""
    with running() as server:
        page = new_page(server.url, may_fail=True)
        page.click("#microphone")
        wait_for_segments(page, 1)
        expect(page.locator("#partial")).not_to_be_empty(timeout=PATIENCE_MS)
        server.kill()
        expect(page.locator("#problem")).to_contain_text("The connection was lost", timeout=PATIENCE_MS)
        before = texts_of(page)
    with running(port=server.ports["http"]) as server:
        expect(page.locator("#problem")).to_be_hidden(timeout=PATIENCE_MS)
        wait_for_segments(page, 2)
        page.click("#microphone")
        wait_for_status(page, "Ready")
        blocks = list(fed.values())[-1]
        assert texts_of(page) == before + expected_texts(demo, server, blocks)
        starts = [float(word.get_attribute("data-start")) for word in page.locator(".word").all()]
        assert starts == sorted(starts)


def test_a_server_that_is_full(new_page, running):
    with running(capacity=1) as server:
        page = new_page(server.url, may_fail=True)
        with server.connect() as other:
            other.start()
            page.click("#microphone")
            expect(page.locator("#problem")).to_contain_text("The server is full", timeout=PATIENCE_MS)
        wait_for_segments(page, 1)
        expect(page.locator("#problem")).to_be_hidden()


def test_a_key_is_asked_for(new_page, running, talk):
    with running(api_key="secret/with=signs") as server:
        page = new_page(server.url, may_fail=True)
        page.set_input_files("#file", talk)
        expect(page.locator("#key-wrong")).to_be_hidden()
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-wrong")).to_have_text("This key is wrong.")
        page.get_by_label("API key").fill("secret/with=signs")
        page.keyboard.press("Enter")
        wait_for_segments(page, 3)


SMALL = """[...document.querySelectorAll('button, summary, input[type=text]')]
  .filter((each) => each.checkVisibility() && Math.min(each.offsetWidth, each.offsetHeight) < 44)
  .map((each) => each.outerHTML)"""
"""Controls too small for a finger, except the words of the text."""
FAINT = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const light = (color, ground) => {
    canvas.fillStyle = ground;
    canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255)
      .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (each) => {
    for (; each; each = each.parentElement) {
      const color = getComputedStyle(each).backgroundColor;
      if (color !== 'rgba(0, 0, 0, 0)') return color;
    }
    return 'white';
  };
  const found = [];
  for (const each of document.querySelectorAll('body *')) {
    const hasText = [...each.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!hasText || !each.checkVisibility() || each.closest('.hidden, .skip, #drop')) continue;
    const lights = [light(getComputedStyle(each).color, ground(each)), light(ground(each), 'white')];
    const [a, b] = lights.sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) found.push([each.outerHTML.slice(0, 100), (a + 0.05) / (b + 0.05)]);
  }
  return found;
}"""


def test_all_text_stands_out(new_page, server, talk):
    def assert_readable():
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate(FAINT) == [], scheme

    page = new_page(server.url)
    assert_readable()
    recognise(page, talk)
    page.evaluate("document.querySelectorAll('.word').forEach((word) => word.style.setProperty('--confidence', 0))")
    page.click("summary")
    assert_readable()


def test_a_phone_shows_it_without_scrolling_sideways_and_a_problem_does_not_hide_the_end(new_page, server, talk):
    page = new_page(server.url, viewport={"width": 320, "height": 480})
    recognise(page, talk)
    last = page.locator(".word").last
    expect(last).to_be_in_viewport(ratio=1)
    page.set_input_files("#file", {"name": "notes.wav", "mimeType": "audio/wav", "buffer": b"nothing to hear"})
    expect(page.locator("#problem")).to_contain_text("notes.wav: cannot be read as audio", timeout=PATIENCE_MS)
    expect(last).to_be_in_viewport(ratio=1)
    page.set_viewport_size({"width": 320, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.click("summary")
    assert page.evaluate(SMALL) == []
    menu, bar = (page.locator(place).bounding_box() for place in (".menu", ".bar"))
    assert menu["y"] + menu["height"] <= bar["y"]  # the menu does not cover the microphone or other buttons
    page.keyboard.press("Escape")
    buttons = re.findall(r"- button(.*)", page.locator("body").aria_snapshot())
    assert len(buttons) > 10
    assert all(re.match(r' "[^"]+"', name) for name in buttons), buttons
