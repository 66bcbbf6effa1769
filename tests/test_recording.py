"""Recognition of recordings, as a whole and by segment, and of damaged recordings."""

import numpy as np
import pytest
import soundfile
from feeding import TINY

from u2moe.runtime import AudioError
from u2moe.runtime import recognition as recognition_module

pytestmark = pytest.mark.slow


@pytest.fixture
def long(sound):
    return np.tile(sound, 8)


@pytest.fixture
def damaged(monkeypatch):
    """Return a function that makes files fail after a number of seconds."""

    def break_off(seconds):
        read_blocks = recognition_module.read_blocks

        def broken(path, rate, *args, **kwargs):
            num_left = round(seconds * rate)
            for block in read_blocks(path, rate, *args, **kwargs):
                if num_left:
                    yield block[:num_left]
                num_left -= min(len(block), num_left)
                if not num_left:
                    raise AudioError(f"{path}: breaks off")

        monkeypatch.setattr(recognition_module, "read_blocks", broken)

    return break_off


@pytest.fixture
def file(long, tmp_path):
    soundfile.write(tmp_path / "a.wav", long, 16_000, subtype="FLOAT")
    return tmp_path / "a.wav"


def test_one_channel_is_recognised(recognizer, sound, tmp_path):
    soundfile.write(tmp_path / "anti.wav", np.stack([sound, -sound], axis=1), 16_000, subtype="FLOAT")
    expected = recognizer.transcribe(sound)
    assert recognizer.transcribe(tmp_path / "anti.wav", channel=0) == expected
    assert list(recognizer.segments(tmp_path / "anti.wav", channel=0)) == expected.segments
    with pytest.raises(ValueError, match="channel and track are only for files"):
        recognizer.transcribe(sound, channel=0)


def test_segments_come_while_the_recording_is_read_and_are_those_of_the_transcript(recognizer, file, long):
    for audio, options in ((file, None), (str(file), TINY), (long, TINY)):
        transcript = recognizer.transcribe(audio, options=options)
        assert list(recognizer.segments(audio, options=options)) == transcript.segments
        assert transcript.complete
        assert transcript.error is None
    # The first segment comes long before the end, and audio is read only on request
    read = []
    segments = recognizer.segments(file, options=TINY, on_progress=read.append)
    assert read == []
    assert next(segments).segment == 0
    assert len(read) <= 1
    assert [segment.segment for segment in segments] == list(range(1, 24))
    assert read == [10.0, 20.0, 30.0, 32.0]


def test_damage_late_in_a_file_keeps_what_was_before(recognizer, file, long, damaged):
    expected = recognizer.transcribe(long[: 25 * 16_000], options=TINY)
    assert len(expected.segments) > 10
    damaged(25.0)
    transcript = recognizer.transcribe(file, options=TINY)
    assert transcript.segments == expected.segments
    assert transcript.text == expected.text
    assert transcript.duration == 25.0
    assert not transcript.complete
    assert transcript.error == f"{file}: breaks off"
    found = []
    with pytest.raises(AudioError, match="breaks off"):
        found.extend(recognizer.segments(file, options=TINY))
    assert found == expected.segments


def test_a_file_of_which_nothing_can_be_read_is_refused_by_the_call_itself(recognizer, file, tmp_path, damaged):
    for call in (recognizer.transcribe, recognizer.segments):
        with pytest.raises(AudioError, match=r"none\.wav: no such file"):
            call(tmp_path / "none.wav")
        with pytest.raises(AudioError, match="NaN"):
            call(np.array([np.nan]))
    damaged(0.0)
    for call in (recognizer.transcribe, recognizer.segments):
        with pytest.raises(AudioError, match="breaks off"):
            call(file)


def test_an_error_of_the_program_is_no_damage(recognizer, file):
    def on_progress(seconds):
        raise AudioError("mine")

    with pytest.raises(AudioError, match="mine"):
        recognizer.transcribe(file, on_progress=on_progress)
