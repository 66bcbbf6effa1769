"""docs/embedding.md: its code blocks run in order on the bundled model, and its statements are correct."""

import builtins
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from u2moe import runtime
from u2moe.runtime import DecodingOptions, Recognizer, VoiceActivityDetector, transcriber
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.decoding.context import DEFAULT_WEIGHT
from u2moe.runtime.decoding.pipeline import MAX_BATCH
from u2moe.runtime.decoding.vad import Speech
from u2moe.runtime.model.settings import SessionSettings
from u2moe.runtime.text.word_errors import words
from u2moe.runtime.validation import FieldError

pytestmark = pytest.mark.slow

RATE = 16_000
GUIDE = Path(__file__).parents[1] / "docs" / "embedding.md"
TEXT = GUIDE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
ERRORS = dict(re.findall(r"^\| (.+?) \| `(\w+Error)` \|$", TEXT, re.MULTILINE))


@pytest.fixture(scope="module")
def demo():
    return Recognizer.from_pretrained()


class AllSpeech:
    """Replaces the detector, whose network may not be installed. It detects speech everywhere."""

    sample_rate = RATE

    def __init__(self, options=None):
        self.options = options

    def speech(self, blocks):
        yield Speech(start=0, samples=np.concatenate(list(blocks)), begins=True, ends=True)


def test_the_code_runs_in_order_and_says_what_was_said(tmp_path, monkeypatch, sounddevice, capsys):
    recording = read_recordings(DEMO_FOLDER / "clips" / "transcripts.txt")[0]
    samples, _ = soundfile.read(recording.path, dtype="float32")
    soundfile.write(tmp_path / "talk.wav", np.stack([samples, samples], axis=1), RATE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "VoiceActivityDetector", AllSpeech)
    names = {"buffers": np.array_split(samples, 40), "wait_for_the_user": lambda: sounddevice.play(samples)}
    printed = []
    for block in BLOCKS:
        exec(block, names)
        printed.append(capsys.readouterr().out)
    assert len(BLOCKS) == 14
    one_shot, by_segment, committed, captions, microphone = (printed[place] for place in (0, 1, 5, 11, 12))
    text = names["recognizer"].transcribe("talk.wav").text
    assert text in one_shot
    assert "None" not in one_shot  # every confidence and both scores are there
    found = [segment.text for segment in names["recognizer"].segments("talk.wav")]
    assert [line.split(" ", 1)[1] for line in by_segment.splitlines()] == found
    heard = set(words(text)) & set(words(recording.transcript))
    for other in (text, committed, names["result"].text):
        assert heard & set(words(other))
    assert committed == names["shown"]
    assert Path("talk.srt").read_text(encoding="utf-8").startswith("1\n00:00:0")
    assert names["vad"].options.min_silence == 0.8
    assert names["result"].is_final
    assert [segment.segment for segment in names["segments"]] == list(range(len(names["segments"])))
    said = [segment.text for segment in names["segments"]]
    assert names["texts"] == [said] * 8 != [[]] * 8
    assert [segment.text for segment in names["finals"]]
    assert captions.splitlines()[-1].startswith("final ")
    assert "\npartial " in f"\n{captions}"
    assert (names["microphone"].num_overflows, names["microphone"].lost_s) == (0, 0.0)
    assert "is_final=True" in microphone


def test_its_names_are_public_and_its_numbers_those_of_the_code():
    imported = {name for line in re.findall("from u2moe.runtime import (.*)", TEXT) for name in line.split(", ")}
    assert {"Recognizer", "Transcriber", "Microphone"} <= imported <= set(runtime.__all__)
    # Class names in backticks must exist.
    classes = set(re.findall(r"`([A-Z]\w+(?:Error|Options|Config|Rule))`", TEXT))
    assert classes - {"ModuleNotFoundError", "ValueError", "TypeError"} <= set(runtime.__all__)
    assert f"up to {transcriber._MAX_KEPT} final results are queued" in TEXT
    assert f"go through the encoder together, {MAX_BATCH} at a time" in TEXT
    assert f"default weight {DEFAULT_WEIGHT}" in TEXT
    assert "`num_threads=1`, the default" in TEXT
    assert SessionSettings().session_options().intra_op_num_threads == 1


def decoded_by_another(demo):
    stream = demo.create_stream()
    with stream.state.claim():
        demo.decode_streams([stream])


def fed_after_end(demo):
    stream = demo.create_stream()
    stream.input_finished()
    stream.accept_waveform(RATE, np.zeros(9))


PROVOKED = {
    "a file that is missing, not audio, or damaged from the start": lambda demo: demo.transcribe("missing.wav"),
    "samples with NaN or infinity": lambda demo: demo.transcribe(np.full(9, np.nan)),
    "samples with several channels, integers other than int16, or values beyond ±8":
        lambda demo: demo.transcribe(np.zeros((9, 2))),
    "an impossible sample rate, or one that changes within a stream":
        lambda demo: demo.transcribe(np.zeros(9), sample_rate=0),
    "silero-vad is not installed, or the file contains another network":
        lambda _: VoiceActivityDetector(DEMO_FOLDER / "ctc.onnx"),
    "a stream or transcriber fed or finished after its end": fed_after_end,
    "a stream decoded by two threads at once": decoded_by_another,
    "a folder that is not a bundle, or is incomplete": lambda _: Recognizer.from_pretrained("."),
    "a provider that is not installed": lambda _: Recognizer.from_pretrained(providers=["RocketExecutionProvider"]),
    "options of the wrong type or out of range": lambda _: DecodingOptions(beam_size=0),
    "hotwords that the vocabulary cannot spell": lambda demo: demo.create_stream(hotwords=["\u2603"]),
}  # fmt: skip
"""Calls that provoke errors of the table. Other tests cover the remaining rows."""


@pytest.mark.parametrize("what", PROVOKED)
def test_errors_are_those_of_the_table(what, demo, tmp_path, monkeypatch):
    expected = getattr(runtime, ERRORS[what], None) or getattr(builtins, ERRORS[what])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(expected) as caught:
        PROVOKED[what](demo)
    # a FieldError is a ValueError that names the field
    assert type(caught.value) in ((ValueError, FieldError) if expected is ValueError else (expected,))
