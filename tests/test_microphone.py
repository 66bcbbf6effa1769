import _thread
import importlib
import threading
import time

import numpy as np
import pytest
from feeding import LIMIT_S, Gate, fail_at

from u2moe.runtime import DecodingOptions, EndpointConfig, EndpointRule, Microphone, Recognizer, Transcriber, cli
from u2moe.runtime.errors import AudioError, AudioOverflowError, MicrophoneError, ProviderError
from u2moe.runtime.text.formats import FORMATS

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture(scope="module")
def segmenting(bundle, model):
    endpoint = EndpointConfig(rule3=EndpointRule(min_utterance_length=1.2))
    return Recognizer(bundle, model, DecodingOptions(chunk_size=8, endpoint=endpoint))


def segments_of(recognizer, *sounds, rate=16_000):
    stream = recognizer.create_stream()
    for samples in sounds:
        stream.accept_waveform(rate, samples)
    stream.input_finished()
    recognizer.decode_streams([stream])
    return stream.take_segments()


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_what_is_played_is_recognised(segmenting, sound, sounddevice, rate):
    """If a device cannot use the model's rate, it gives its own."""
    sounddevice.rates, played, finals = [rate], np.repeat(sound, rate // 16_000), []
    with Transcriber(segmenting, on_final=finals.append) as transcriber, Microphone(transcriber) as microphone:
        assert microphone.is_active
        sounddevice.play(played)
    assert not microphone.is_active
    assert len(finals) > 1
    assert finals == segments_of(segmenting, played, rate=rate)
    assert (transcriber.duration, microphone.sample_rate) == (pytest.approx(4.0), rate)
    expected = {"samplerate": rate, "channels": 1, "dtype": "float32", "blocksize": rate // 20}
    assert sounddevice.settings.items() >= expected.items()
    assert (microphone.num_overflows, microphone.lost_s) == (0, 0.0)


def test_the_callback_never_waits_and_what_is_lost_is_counted_and_told(segmenting, sound, sounddevice):
    gate, finals = Gate(), []
    with (
        Transcriber(segmenting, on_final=finals.append, on_error=gate, max_queue_s=1.0) as transcriber,
        Microphone(transcriber) as microphone,
    ):
        transcriber.report(AudioError("stop here"))
        assert gate.reached.wait(LIMIT_S)
        sounddevice.play(sound[:24_000])  # returns although recognition is blocked
        assert (microphone.num_overflows, microphone.lost_s) == (1, pytest.approx(0.5))
        gate.open.set()
        while transcriber.queued_s:
            time.sleep(0.01)
        sounddevice.play(sound[24_000:32_000])
        assert microphone.num_overflows == 1
        while transcriber.queued_s:
            time.sleep(0.01)
        gate.open.clear()
        gate.reached.clear()
        transcriber.report(AudioError("stop here again"))
        assert gate.reached.wait(LIMIT_S)
        sounddevice.play(sound)
        microphone.close()
        gate.open.set()
    assert [type(error) for error in gate.calls] == 2 * [AudioError, AudioOverflowError]
    assert str(gate.calls[1]).startswith("lost 0.50 s of audio from the microphone: 1.00 s of audio is waiting")
    assert [gate.calls[place].duration for place in (1, 3)] == pytest.approx([0.5, 3.0])
    assert finals == segments_of(segmenting, sound[:16_000], sound[24_000:32_000], sound[:16_000])


def test_numbers_that_are_none_and_a_microphone_that_goes_away_are_told(segmenting, sound, sounddevice):
    errors, finals = [], []
    callbacks = {"on_error": errors.append, "on_final": finals.append}
    with Transcriber(segmenting, **callbacks) as transcriber, Microphone(transcriber) as microphone:
        sounddevice.play(sound[:8000])
        sounddevice.play(np.full(1600, np.nan, np.float32))
        sounddevice.play(sound[8000:9600])
        sounddevice.play(sound[9600:11_200], input_overflow=True)
        sounddevice.play(sound[11_200:])
        sounddevice.end()
        assert not microphone.is_active
    first, lost, last = errors
    assert [type(error) for error in errors] == [MicrophoneError, AudioOverflowError, MicrophoneError]
    assert str(first) == "lost 0.10 s of audio from the microphone: samples contain NaN or infinity"
    assert "the audio system dropped it" in str(lost)
    assert str(last) == "the microphone has stopped: is it connected?"
    assert (microphone.num_overflows, microphone.lost_s) == (2, pytest.approx(0.1))
    assert finals == segments_of(segmenting, sound)


def test_it_stops_when_its_transcriber_has_ended(bundle, model, sound, sounddevice):
    recognizer, errors = Recognizer(bundle, model), []
    fail_at(recognizer, 1, ProviderError("the device is gone"))
    with Transcriber(recognizer, on_error=errors.append) as transcriber, Microphone(transcriber) as microphone:
        sounddevice.play(sound[:800])
        transcriber._thread.thread.join(LIMIT_S)
        sounddevice.play(sound)
        assert not microphone.is_active
    assert [str(error) for error in errors] == ["the device is gone"]


@pytest.mark.parametrize(("error", "message"), [
    (ImportError("no module"), r"needs sounddevice: pip install '\.\[microphone\]'"),
    (OSError("PortAudio library not found"), "PortAudio library not found: install libportaudio2"),
])  # fmt: skip
def test_what_is_not_installed_is_named(segmenting, monkeypatch, error, message):
    def import_module(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", import_module)
    with Transcriber(segmenting) as transcriber, pytest.raises(MicrophoneError, match=message):
        Microphone(transcriber)


def test_a_device_that_is_not_there_not_in_use_or_does_not_start(segmenting, sounddevice):
    def refuse():
        raise sounddevice.PortAudioError("Device unavailable")

    closed, sounddevice.on_start = [], refuse
    with Transcriber(segmenting) as transcriber:
        microphone = Microphone(transcriber)
        assert not microphone.is_active
        sounddevice.stream.close = lambda: closed.append(True)
        with pytest.raises(MicrophoneError, match="Device unavailable"), microphone:
            pass
        assert closed
        microphone.close()
        with pytest.raises(MicrophoneError, match="closed"):
            microphone.start()
        for block_s in (0, 1.5, float("nan")):
            with pytest.raises(ValueError, match="block_s"):
                Microphone(transcriber, block_s=block_s)
        with pytest.raises(MicrophoneError, match="No input device matching 0"):
            Microphone(transcriber, device=0)
        sounddevice.devices = sounddevice.devices[:1]
        with pytest.raises(MicrophoneError, match="cannot be used: No input device"):
            Microphone(transcriber)


def listen(bundle, *arguments):
    return cli.main(["listen", "--model", str(bundle.path), "--chunk-size", "8", *arguments])


@pytest.fixture
def speech(sounddevice, sound):
    """Return a function that plays speech as soon as the microphone is open, then ends it, by default with Ctrl-C."""

    def start(end=_thread.interrupt_main, **settings):
        def speak():
            sounddevice.play(sound, **settings)
            end()

        sounddevice.on_start = lambda: threading.Thread(target=speak).start()

    return start


@pytest.mark.slow
@pytest.mark.parametrize("form", ["json", "tsv"])
def test_listen_until_ctrl_c_to_the_last_word(bundle, model, speech, sound, sounddevice, capsys, form):
    speech()
    assert listen(bundle, "--device", "1", "-f", form) == 0
    options, written = DecodingOptions(chunk_size=8, endpoint=EndpointConfig()), FORMATS[form]
    expected = segments_of(Recognizer(bundle, model, options), sound)
    out, err = capsys.readouterr()
    assert expected
    assert out == (written.header or "") + "".join(written.segment(each, "microphone") for each in expected)
    lines = err.splitlines()
    assert lines[0] == "listening; press Ctrl-C to stop"
    assert len(lines) > 2  # partial results
    assert sounddevice.settings["device"] == 1


def test_listen_goes_on_after_loss_and_ends_when_the_microphone_goes(bundle, sounddevice, speech, capsys):
    speech(input_overflow=True)
    assert listen(bundle) == 0
    out, err = capsys.readouterr()
    assert out
    assert "u2moe: error: lost audio from the microphone: the audio system dropped it" in err
    speech(sounddevice.end)
    assert listen(bundle) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "u2moe: error: the microphone has stopped: is it connected?"
    assert listen(bundle, "--device", "list") == 0
    assert capsys.readouterr().out == "1\tHeadset\n"
