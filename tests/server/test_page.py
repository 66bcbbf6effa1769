"""The page in a browser: Debian's Chromium with a microphone that plays a file."""

import json
import re

import numpy as np
import pytest
import soundfile
from browsing import PATIENCE_MS, chromium, fake_microphone, needs_chromium
from playwright.sync_api import expect

from u2moe.runtime.server.session import ServerSession

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def microphone_file(tmp_path_factory, speech):
    """What the microphone hears: speech once, at its own rate of 48 kHz, then silence."""
    file = tmp_path_factory.mktemp("microphone") / "speech.wav"
    soundfile.write(file, np.concatenate([np.zeros(24_000, np.int16), speech(48_000)]), 48_000)
    return file


@pytest.fixture(scope="module")
def browser(microphone_file):
    with chromium(*fake_microphone(microphone_file)) as browser:
        yield browser


@pytest.fixture
def page(new_page, server):
    return new_page(server.url)


def words_of(page):
    return page.locator(".word").all_inner_texts()


def wait_for_segments(page, count):
    expect(page.locator("#segments li")).to_have_count(count, timeout=PATIENCE_MS)


def test_a_file_becomes_words_that_can_be_saved(page, speech, demo, server, tmp_path):
    wanted = demo.transcribe(speech(), options=server.service.stream_options).segments
    soundfile.write(tmp_path / "talk.wav", speech(), 16_000)
    page.set_input_files("#file", tmp_path / "talk.wav")
    wait_for_segments(page, len(wanted))
    assert words_of(page) == [word.word for segment in wanted for word in segment.words]
    expect(page.locator("#status-text")).to_have_text("Ready", timeout=PATIENCE_MS)
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
            assert text.startswith("WEBVTT\n" if kind == "vtt" else "1\n")
            assert len(re.findall(r"\d\d:\d\d:\d\d[.,]\d{3} --> \d\d:\d\d:\d\d[.,]\d{3}\n", text)) >= len(wanted)
            assert " ".join(line for line in text.splitlines() if line.isupper() and line != "WEBVTT") == " ".join(
                segment.text for segment in wanted
            )


def test_a_word_is_played_and_reached_by_keys(page, speech, tmp_path):
    soundfile.write(tmp_path / "talk.wav", speech(), 16_000)
    page.set_input_files("#file", tmp_path / "talk.wav")
    wait_for_segments(page, 3)
    expect(page.locator("#status-text")).to_have_text("Ready", timeout=PATIENCE_MS)
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


@pytest.fixture
def fed(monkeypatch):
    """What each session of the servers was fed, in order."""
    sources = {}
    feed = ServerSession.feed

    async def record(session, samples):
        sources.setdefault(session, []).append(samples)
        await feed(session, samples)

    monkeypatch.setattr(ServerSession, "feed", record)
    return sources


def texts_of(page):
    return [" ".join(item.locator(".word").all_inner_texts()) for item in page.locator("#segments li").all()]


def expected_texts(demo, server, blocks):
    transcript = demo.transcribe(np.concatenate(blocks), options=server.service.stream_options)
    return [segment.text for segment in transcript.segments]


def test_the_microphone(page, demo, server, fed):
    page.click("#microphone")
    expect(page.locator("#status-text")).to_have_text("Listening")
    expect(page.locator("#partial")).not_to_be_empty(timeout=PATIENCE_MS)
    wait_for_segments(page, 3)
    page.keyboard.press("m")
    expect(page.locator("#status-text")).to_have_text("Ready", timeout=PATIENCE_MS)
    (blocks,) = fed.values()
    assert texts_of(page) == expected_texts(demo, server, blocks)
    assert len(texts_of(page)) >= 3  # what a busy machine loses of the sound may leave a word
    server.wait_until_empty()


HOLD_ALL = """() => {
  // Blocks that are never whole, so that the audio thread holds all that it has heard.
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
        if (data.last) heard.last += data.last.length;
        else heard.blocks += 1;
      });
    }
  };
}"""


def test_the_last_moment_of_the_microphone(new_page, demo, server, fed):
    """What the audio thread still holds when one stops is recognised, and what the resampler holds back, too."""
    page = new_page(server.url, bypass_csp=True)  # for the changed script
    page.evaluate(HOLD_ALL)
    page.click("#microphone")
    expect(page.locator("#status-text")).to_have_text("Listening")
    page.wait_for_timeout(2000)  # the first words
    page.click("#microphone")
    expect(page.locator("#status-text")).to_have_text("Ready", timeout=PATIENCE_MS)
    heard = page.evaluate("heard")
    assert heard["blocks"] == 0
    assert heard["last"] > heard["rate"]
    samples = np.concatenate([block for blocks in fed.values() for block in blocks])
    assert len(samples) == round(heard["last"] * 16_000 / heard["rate"])
    assert texts_of(page) == expected_texts(demo, server, [samples])


def test_a_server_that_goes_and_comes_back(new_page, demo, running, fed):
    """What was recognised stays; what was not yet is sent again; and nothing comes twice."""
    with running() as server:
        page = new_page(server.url, may_fail=True)
        page.click("#microphone")
        wait_for_segments(page, 1)
        expect(page.locator("#partial")).not_to_be_empty(timeout=PATIENCE_MS)
        server.kill()
        expect(page.locator("#problem")).to_contain_text("The connection is lost", timeout=PATIENCE_MS)
        before = texts_of(page)
    with running(port=server.ports["http"]) as server:
        expect(page.locator("#problem")).to_be_hidden(timeout=PATIENCE_MS)
        wait_for_segments(page, 3)
        page.click("#microphone")
        expect(page.locator("#status-text")).to_have_text("Ready", timeout=PATIENCE_MS)
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


def test_a_problem_does_not_hide_the_end(new_page, server, speech, tmp_path):
    soundfile.write(tmp_path / "talk.wav", speech(), 16_000)
    page = new_page(server.url, viewport={"width": 320, "height": 480})
    page.set_input_files("#file", tmp_path / "talk.wav")
    wait_for_segments(page, 3)
    expect(page.locator("#status-text")).to_have_text("Ready", timeout=PATIENCE_MS)
    last = page.locator(".word").last
    expect(last).to_be_in_viewport(ratio=1)
    page.set_input_files("#file", {"name": "notes.wav", "mimeType": "audio/wav", "buffer": b"nothing to hear"})
    expect(page.locator("#problem")).to_contain_text("no audio that this browser can read", timeout=PATIENCE_MS)
    expect(last).to_be_in_viewport(ratio=1)


def test_a_key_is_asked_for(new_page, running, speech, tmp_path):
    soundfile.write(tmp_path / "talk.wav", speech(), 16_000)
    with running(api_key="secret/with=signs") as server:
        page = new_page(server.url, may_fail=True)
        page.set_input_files("#file", tmp_path / "talk.wav")
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_label("API key").fill("secret/with=signs")
        page.keyboard.press("Enter")
        wait_for_segments(page, 3)


def test_a_phone_shows_it_without_scrolling_sideways(new_page, server, speech, tmp_path):
    soundfile.write(tmp_path / "talk.wav", speech(), 16_000)
    page = new_page(server.url, viewport={"width": 320, "height": 640})
    page.set_input_files("#file", tmp_path / "talk.wav")
    wait_for_segments(page, 3)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    buttons = re.findall(r"- button(.*)", page.locator("body").aria_snapshot())
    assert len(buttons) > 10
    assert all(re.match(r' "[^"]+"', name) for name in buttons), buttons
