"""Channels and damage of recordings, as the recogniser shows them."""

import numpy as np
import pytest
import soundfile

from u2moe.runtime import AudioError, AudioWarning


def test_one_channel_is_recognised(recognizer, sound, tmp_path):
    soundfile.write(tmp_path / "anti.wav", np.stack([sound, -sound], axis=1), 16_000, subtype="FLOAT")
    expected = recognizer.transcribe(sound)
    assert recognizer.transcribe(tmp_path / "anti.wav", channel=0) == expected
    assert list(recognizer.segments(tmp_path / "anti.wav", channel=0)) == expected.segments
    with pytest.warns(AudioWarning, match="cancel each other"):
        assert recognizer.transcribe(tmp_path / "anti.wav") != expected
    with pytest.raises(AudioError, match="there is no channel 2"):
        recognizer.transcribe(tmp_path / "anti.wav", channel=2)
    with pytest.raises(ValueError, match="channel and track are only for files"):
        recognizer.transcribe(sound, channel=0)


def test_a_file_that_was_cut_off_gives_what_is_there(recognizer, sound, tmp_path):
    soundfile.write(tmp_path / "a.wav", sound, 16_000)
    content = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(content[: len(content) // 2])
    found = recognizer.transcribe(tmp_path / "cut.wav")
    assert found.text
    assert not found.complete
    assert "cut.wav: holds 63978 of the 128000 bytes of audio that its header states: it was cut off" in found.error
