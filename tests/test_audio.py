import contextlib
import io
import os
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from damaged_audio import encoded
from hypothesis import given, settings
from hypothesis import strategies as st

from u2moe.runtime.audio.arrays import Resampler, as_samples, convert
from u2moe.runtime.audio.files import find_audio
from u2moe.runtime.audio.raw import RawAudio
from u2moe.runtime.audio.reading import duration_of, read_audio, read_blocks
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.errors import AudioError, AudioWarning, TruncatedAudioError

RATE = 16_000
RATES = [(8000, 16_000), (44_100, 16_000), (48_000, 16_000), (16_000, 8000), (44_056, 16_000), (22_050, 16_000)]


def tone(rate, seconds=1.0, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def test_mp3_files_are_decoded_once(tmp_path, monkeypatch, capfd):
    """If soundfile seeks after each read, libsndfile decodes frames again that depend on earlier ones."""
    speech, rate = soundfile.read(DEMO_FOLDER / "clips" / "question.flac")
    soundfile.write(tmp_path / "speech.mp3", speech, rate)
    seeks = []
    monkeypatch.setattr(soundfile.SoundFile, "seek", lambda *arguments: seeks.append(arguments))
    assert len(read_audio(tmp_path / "speech.mp3", rate)) == len(speech)
    assert (seeks, capfd.readouterr().err) == ([], "")


@pytest.mark.parametrize(("rate", "num_channels"), [(8000, 2), (11_025, 6), (22_050, 1), (48_000, 6), (96_000, 2)])
def test_any_rate_and_channel_count(tmp_path, rate, num_channels):
    channels = tone(rate)[:, None] * np.linspace(0, 2, num_channels) if num_channels > 1 else tone(rate)
    soundfile.write(tmp_path / "a.wav", channels, rate, subtype="FLOAT")
    samples = read_audio(tmp_path / "a.wav", RATE)
    assert len(samples) == RATE
    # Not near the ends, where the filter lacks samples on one side: the mean of the channels at the new rate.
    assert np.abs(samples - tone(RATE))[800:-800].max() < 1e-3


def resampled(samples, rates, sizes=(), *, has_soxr=False):
    with pytest.MonkeyPatch.context() as patch:
        if not has_soxr:
            patch.setitem(sys.modules, "soxr", None)  # as if it were not installed
        resampler, parts, start = Resampler(*rates), [], 0
    for size in [*sizes, len(samples)]:
        parts.append(resampler.accept(samples[start : start + size]))
        start += size
    return np.concatenate([*parts, resampler.finish()])


@settings(max_examples=20)
@given(
    rates=st.sampled_from([*RATES, (16_000, 16_000)]), num_samples=st.sampled_from([0, 1, 7, 3000]),
    sizes=st.lists(st.integers(0, 1500), max_size=6), has_soxr=st.booleans(),
)  # fmt: skip
def test_any_split_gives_the_same_samples_with_and_without_soxr(rates, num_samples, sizes, has_soxr):
    samples = np.random.default_rng(0).standard_normal(num_samples).astype(np.float32)
    expected = resampled(samples, rates, has_soxr=has_soxr)
    assert np.array_equal(resampled(samples, rates, sizes, has_soxr=has_soxr), expected)
    assert len(expected) == len(resampled(samples, rates, has_soxr=not has_soxr))
    assert abs(len(expected) - num_samples * rates[1] / rates[0]) <= 0.5


@pytest.mark.parametrize("rates", RATES)
def test_without_soxr_tones_within_the_band_stay_and_what_the_new_rate_cannot_hold_is_removed(rates):
    source, target = rates
    low, high = 0.4 * min(rates), 0.55 * target
    found = resampled(tone(source, 0.25, low), rates)
    assert np.abs(found - tone(target, 0.25, low))[500:-500].max() < 1e-4
    if target < source:
        assert 20 * np.log10(2 * np.abs(resampled(tone(source, 0.25, high), rates)[500:-500]).max()) < -80


def test_arrays_and_raw_audio_of_a_device_that_has_nothing_yet():
    assert as_samples([0.5, -0.5]).dtype == np.float32
    assert as_samples([]).shape == (0,)
    for kind in ("<i2", ">i2"):
        np.testing.assert_array_equal(as_samples(np.array([-32768, 16384], kind)), [-1.0, 0.5])
    assert as_samples(np.array([0.25], np.float16)).dtype == np.float32
    assert len(np.concatenate(list(convert(np.zeros(RATE), np.float16(RATE), 8000)))) == 8000
    # As in `io.RawIOBase`, None means "nothing yet", and empty bytes mean the end
    portions = iter([None, b"\1\0", None, b"\2\0", b""])
    audio = RawAudio(file=SimpleNamespace(read=lambda _: next(portions)), sample_rate=RATE)
    assert (read_audio(audio, RATE) * 32768).tolist() == [1, 2]


class OnDevice:
    def __array__(self, dtype=None, copy=None):
        raise TypeError("on a GPU")  # as PyTorch does


@pytest.mark.parametrize(("samples", "message"), [
    (OnDevice(), "samples are not an array: on a GPU"),
    (np.zeros((2, 3), np.float32), "one axis"),
    (np.float32(1), r"one axis, got shape \(\)$"),
    (np.array([np.nan], np.float32), "NaN"),
    (np.array([-np.inf], np.float32), "NaN or infinity"),
    (np.array([20_000.0], np.float32), "samples reach 20000"),
    *((np.zeros(3, kind), f"got {kind}") for kind in ("int32", "uint8", "bool", "complex64")),
    (["a"], "got <U1"),
    ([[1.0], [1.0, 2.0]], "not an array"),
    (None, "must be an array, got NoneType"),
    *((each, rf"an array, got {type(each).__name__}.*np\.frombuffer") for each in ("talk.wav", b"\0\0", bytearray(2))),
])  # fmt: skip
def test_arrays_that_are_refused(samples, message):
    with pytest.raises(AudioError, match=message):
        as_samples(samples)


@pytest.mark.parametrize("rate", [0, -1, 999, 1e9, float("nan"), "16000", True, [16_000], np.float16(np.inf)])
def test_rates_that_are_refused(rate):
    with pytest.raises(AudioError, match="sample rate"):
        Resampler(rate, RATE)


def test_files_that_are_refused(tmp_path, monkeypatch):
    for name in (texts := ("text.wav", "text.mp3", "text.raw", "text")):
        (tmp_path / name).write_text("not audio")
    soundfile.write(tmp_path / "slow.wav", np.zeros(10), 100)
    for path, message in {
        tmp_path / "nothing.wav": r"nothing\.wav: no such file",
        **{tmp_path / name: f"{name}: cannot be read as audio" for name in texts},
        tmp_path: "is a folder, expected a file",
        tmp_path / ("a" * 300): "File name too long",
        "a\0b.wav": "null (byte|character)",
        tmp_path / "slow.wav": r"slow\.wav: sample rate",
    }.items():
        with pytest.raises(AudioError, match=message):
            read_audio(path, RATE)
        assert duration_of(path) == 0 or "slow" in message

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refused)
    with pytest.raises(AudioError, match=r"text\.wav: cannot be read: Permission denied"):
        read_audio(tmp_path / "text.wav", RATE)


def test_folders_are_searched_and_links_to_folders_followed_once(tmp_path):
    for name in ("b/2.flac", "a.WAV", "notes.txt", "._a.WAV", "deep/a.wav"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "in" / name).touch()
    found = [tmp_path / "in" / name for name in ("a.WAV", "b/2.flac", "deep/a.wav")]
    assert find_audio([tmp_path / "missing.wav", tmp_path / "in"]) == [tmp_path / "missing.wav", *found]
    (tmp_path / "links").mkdir()
    with pytest.raises(AudioError, match="no audio files"):
        find_audio([tmp_path / "links"])
    for name, target in (("one", "in/deep"), ("two", "in/deep"), ("circle", "links")):
        (tmp_path / "links" / name).symlink_to(tmp_path / target, target_is_directory=True)
    assert find_audio([tmp_path / "links"]) == [tmp_path / "links" / "one" / "a.wav"]


def test_a_wav_that_states_no_audio_or_too_much_is_read_to_its_end(tmp_path):
    """A recorder that crashes before it writes the length leaves the former, a program that writes to a pipe the
    latter."""
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    whole, position = read_audio(bytes(content), RATE), content.index(b"data") + 4
    for stated in (0x7FFFF000, 0xFFFFFFFF, 0):
        content[position : position + 4] = stated.to_bytes(4, "little")
        (tmp_path / "odd.wav").write_bytes(content)
        warned = pytest.warns(AudioWarning, match=r"odd\.wav: its header states no")
        with contextlib.nullcontext() if stated else warned:
            assert np.array_equal(read_audio(tmp_path / "odd.wav", RATE), whole)
    for stated in (0xFFFFFFFF, 0x7FFFF000, 1 << 30):  # the last is the length modulo 4 GiB
        with (tmp_path / "odd.wav").open("wb") as file:  # sparse
            file.write(content[:position] + stated.to_bytes(4, "little"))
            file.truncate(position + 4 + (5 << 30))
        with pytest.warns(AudioWarning, match=r"odd\.wav: its header states no audio or too little"):
            assert duration_of(tmp_path / "odd.wav") == (5 << 30) / 2 / RATE
    content[position : position + 4] = bytes(4)
    # Really without audio, because another chunk follows, or the file ends
    for rest in (b"LIST\4\0\0\0INFO", b"TAG" + bytes(125), b""):
        (tmp_path / "empty.wav").write_bytes(content[: position + 4] + rest)
        assert len(read_audio(tmp_path / "empty.wav", RATE)) == 0


@pytest.mark.parametrize(("form", "mark", "place", "num_bytes"), [
    ("WAV", b"data", 4, 4), ("RF64", b"ds64", 16, 8), ("AIFF", b"SSND", 4, 4), ("AU", b".snd", 8, 4),
    ("FLAC", b"fLaC", 22, 4),
])  # fmt: skip
def test_a_header_that_states_too_little_loses_nothing(form, mark, place, num_bytes):
    """A recorder updated its header from time to time, and then crashed; or files in a row."""
    content = bytearray(encoded(tone(RATE), RATE, form, "PCM_16"))
    whole, begin = read_audio(bytes(content), RATE), content.index(mark) + place
    for stated in (1, RATE // 2, RATE - 10):
        few = stated if form == "FLAC" else 2 * stated
        content[begin : begin + num_bytes] = few.to_bytes(num_bytes, "little" if form in ("WAV", "RF64") else "big")
        with pytest.warns(AudioWarning, match="bytes: its header states no audio or too little"):
            assert np.array_equal(read_audio(bytes(content), RATE), whole)


@pytest.mark.parametrize("suffix", ["wav", "aiff", "au", "w64", "rf64", "ogg", "opus", "mp3"])
def test_files_that_were_cut_off(tmp_path, suffix):
    """Readers yield their samples, then raise an error. libsndfile itself detects truncated FLAC."""
    file, cut = tmp_path / f"a.{suffix}", tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).normal(0, 0.1, 3 * RATE)  # several pages of Ogg
    soundfile.write(file, noise, RATE, **({"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}))
    cut.write_bytes(content := file.read_bytes()[: file.stat().st_size * 6 // 10])
    found = []
    with pytest.raises(TruncatedAudioError, match=rf"cut\.{suffix}: (contains|ends without) .*: it is truncated"):
        found.extend(read_blocks(cut, RATE, 0.1))
    with pytest.warns(AudioWarning, match="it is truncated"):
        samples = read_audio(cut, RATE)
    assert 0 < len(np.concatenate(found)) == len(samples) < 0.8 * len(read_audio(file, RATE))
    for file in (content, io.BytesIO(content)):
        with pytest.warns(AudioWarning, match="it is truncated"):
            assert np.array_equal(read_audio(file, RATE), samples)


def test_one_channel_can_be_chosen_where_channels_cancel_each_other(tmp_path):
    left, right = tone(RATE), tone(RATE, hertz=1000.0)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    for channel, expected in enumerate((left, right)):
        assert np.array_equal(read_audio(tmp_path / "a.wav", RATE, channel=channel), expected)
    for channel in (2, -1):
        with pytest.raises(AudioError, match=rf"a\.wav: channel {channel} does not exist: channels .* file has 2"):
            read_audio(tmp_path / "a.wav", RATE, channel=channel)
    voice = tone(RATE, 3.0)
    soundfile.write(tmp_path / "anti.wav", np.stack([voice, -voice], axis=1), RATE, subtype="FLOAT")
    with pytest.warns(AudioWarning, match=r"anti\.wav: its channels cancel each other") as caught:
        assert np.abs(np.concatenate(list(read_blocks(tmp_path / "anti.wav", RATE, 0.5)))).max() < 1e-3
    assert len(caught) == 1  # of six buffers
    assert np.array_equal(read_audio(tmp_path / "anti.wav", RATE, channel=1), -voice)
    soundfile.write(tmp_path / "one.wav", np.stack([voice, 0 * voice], axis=1), RATE, subtype="FLOAT")
    assert np.abs(read_audio(tmp_path / "one.wav", RATE)).max() > 0.2  # half the amplitude, and no warning


def test_parts_of_files_in_which_libsndfile_cannot_seek(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(8000, 3.0), 8000, subtype="GSM610")
    part = np.concatenate(list(read_blocks(tmp_path / "a.wav", 8000, start=1, end=2)))
    assert np.array_equal(part, read_audio(tmp_path / "a.wav", 8000)[8000:16_000])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipes_are_read(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(RATE), RATE)
    os.mkfifo(pipe := tmp_path / "pipe")
    for is_open in (False, True):
        writer = threading.Thread(target=pipe.write_bytes, args=[(tmp_path / "a.flac").read_bytes()])
        writer.start()
        with pipe.open("rb") if is_open else contextlib.nullcontext(pipe) as file:
            assert np.array_equal(read_audio(file, RATE), read_audio(tmp_path / "a.flac", RATE))
        writer.join()


def test_what_is_passed_over_in_a_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # as if the extra were not installed
    monkeypatch.setattr("u2moe.runtime.audio.files.has_media", lambda: False)
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE)
    for name in ("b.au", "c.m4a", "d.MP4", "notes.txt"):
        (tmp_path / name).write_text("x")
    with pytest.warns(AudioWarning, match=r"cannot read .*c\.m4a, .*d\.MP4 \(media files need: pip install '\.\[medi"):
        assert find_audio([tmp_path]) == [tmp_path / "a.wav", tmp_path / "b.au"]
    assert len(read_audio(tmp_path / "a.wav", RATE)) == RATE
    with pytest.raises(AudioError, match=r"c\.m4a: needs the Python package av: pip install '\.\[media\]'"):
        read_audio(tmp_path / "c.m4a", RATE)


def test_all_is_read_up_to_the_damage(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).normal(0, 0.1, 8 * RATE).astype(np.float32), RATE)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    place = len(content) * 7 // 8  # after seven of eight seconds; all eight are in one buffer
    content[place : place + 2000] = bytes(2000)
    (tmp_path / "a.flac").write_bytes(content)
    blocks = read_blocks(tmp_path / "a.flac", RATE)
    assert 6.4 * RATE < len(next(blocks)) < 7.2 * RATE
    with pytest.raises(AudioError, match=r"a\.flac: cannot be read as audio"):
        next(blocks)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("value", "message"), [(np.nan, "contain NaN or infinity"), (9.0, "reach 9")])
def test_all_is_read_up_to_a_sample_that_is_none(tmp_path, channels, value, message):
    samples = np.stack([tone(RATE, 3.0)] * channels, axis=1)
    samples[2 * RATE] = value
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    for block_s in (10.0, 0.1):
        found = []
        with pytest.raises(AudioError, match=rf"a\.wav: samples {message}"):
            found.extend(read_blocks(tmp_path / "a.wav", RATE, block_s))
        read = np.concatenate(found)
        assert 1.6 * RATE < len(read) <= 2 * RATE
        assert np.array_equal(read, samples[: len(read), 0])
    soundfile.write(tmp_path / "b.wav", np.full(RATE, value), RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=rf"b\.wav: samples {message}"):  # all samples are invalid
        next(filter(len, read_blocks(tmp_path / "b.wav", RATE)))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows pipes always block")
@pytest.mark.parametrize(("buffering", "is_blocking"), [(-1, True), (-1, False), (0, False)])
def test_raw_audio_from_a_pipe_comes_as_it_is_written(buffering, is_blocking):
    samples, (reading, writing) = np.arange(2000, dtype="<i2"), os.pipe()
    os.set_blocking(reading, is_blocking)
    with os.fdopen(reading, "rb", buffering=buffering) as file:
        blocks, content = read_blocks(RawAudio(file=file, sample_rate=RATE), RATE), samples.tobytes()
        for part, expected in ((content[:2001], samples[:1000]), (content[2001:] + b"\0", samples[1000:])):
            threading.Timer(0.05, os.write, (writing, part)).start()
            assert np.array_equal(next(blocks) * 32768, expected)
        os.close(writing)
        with pytest.raises(TruncatedAudioError, match="raw audio: ends with 1 bytes of an incomplete sample"):
            list(blocks)
