"""Media files with the extra [media]: the samples of ffmpeg, tracks, damage, bytes and file objects; and raw audio."""

import io
import itertools
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import soundfile
from damaged_audio import encoded
from media import CODECS, LAYOUTS, write_media

from u2moe.runtime import RawAudio
from u2moe.runtime.audio.media import MediaFile
from u2moe.runtime.audio.reading import duration_of, read_audio, read_blocks
from u2moe.runtime.errors import AudioError, AudioWarning

av = pytest.importorskip("av")

RATE = 16_000
FFMPEG = shutil.which("ffmpeg")
SPEECH = np.random.default_rng(0).normal(0, 0.1, 2 * RATE).astype(np.float32)


@pytest.mark.parametrize("suffix", [*CODECS, pytest.param("amr", marks=pytest.mark.skipif(
    "libopencore_amrnb" not in av.codecs_available, reason="this PyAV cannot write AMR"))])  # fmt: skip
def test_files_give_their_samples_and_those_of_ffmpeg(tmp_path, suffix):
    rate = {"webm": 48_000, "ac3": 32_000, "flv": 44_100, "amr": 8000}.get(suffix, RATE)
    tone = np.sin(np.arange(2 * rate, dtype=np.float32) * (2 * np.pi * 440 / rate)) * np.float32(0.6)
    samples = tone if suffix == "amr" else np.stack((tone, 0.75 * tone), axis=1)
    file = write_media(tmp_path / f"a.{suffix}", [samples], rate=rate)
    read = read_audio(file, RATE)
    assert abs(len(read) - 2 * RATE) < 0.12 * RATE  # codecs pad to whole frames
    spectrum = np.abs(np.fft.rfft(read[: 2 * RATE]))
    assert abs(spectrum.argmax() * RATE / min(len(read), 2 * RATE) - 440) < 2
    assert 0.3 < np.sqrt(np.mean(read**2)) < 0.43
    states_none = suffix in ("aac", "avi", "ac3", "flv", "wv", "amr", "ts")
    assert states_none or abs(duration_of(file) - 2) < 0.1
    if suffix in ("mp4", "mkv", "mov"):
        np.testing.assert_allclose(read[: len(samples)], samples.mean(axis=1), atol=2**-15)
    if FFMPEG is None or suffix == "amr":
        return
    command = [FFMPEG, "-v", "error", "-i", file, "-map", "0:a:0", "-f", "f32le", "-"]
    expected = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, "<f4").reshape(-1, 2)
    with file.open("rb") as stream:
        media, blocks = MediaFile(stream), []
        while len(block := media.read(7000)):
            blocks.append(block)
        read = np.concatenate(blocks)
        media.close()
    # Another version of ffmpeg may round lossy formats differently, or omit the encoder's padding in m4a.
    length = min(len(read), len(expected)) if suffix == "m4a" else len(expected)
    assert abs(len(read) - len(expected)) < (1024 if suffix == "m4a" else 1)
    tolerance = 0 if suffix in ("mkv", "mov", "mka", "mp4", "avi") else 1e-5
    np.testing.assert_allclose(read[:length], expected[:length], atol=tolerance)


def test_files_of_many_channels(tmp_path):
    """Planes of 8 bits (WavPack) and packed samples (mov). PyAV crashed for 8 planes."""
    for (suffix, tolerance), num_channels in itertools.product((("wv", 2**-7), ("mov", 2**-15)), LAYOUTS):
        expected = np.resize(SPEECH, (9000, num_channels))
        with write_media(tmp_path / f"{num_channels}.{suffix}", [expected]).open("rb") as file:
            media = MediaFile(file)
            np.testing.assert_allclose(media.read(10_000), expected, atol=tolerance, err_msg=file.name)
            media.close()


READERS = """
import resource, sys
from u2moe.runtime.audio.reading import read_blocks
before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in sys.argv[1:]:
    assert sum(map(len, read_blocks(file, 16_000))) >= 8000, file
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before_kb + 150_000
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory")
def test_recordings_that_have_ended_programs(tmp_path):
    """7.1 Opus, AAC with headers for 8 channels, and Ogg Vorbis with 255 channels at 192 kHz, read in one process."""
    opus = write_media(tmp_path / "opus.webm", [np.resize(SPEECH, (48_000, 8))], rate=48_000)
    aac = write_media(tmp_path / "fuzzed.aac", [SPEECH])
    content = bytearray(aac.read_bytes())
    for place in range(len(content) - 3):
        if content[place] == 0xFF and content[place + 1] & 0xF6 == 0xF0:  # ADTS: configuration 7 means 8 channels
            content[place + 2 : place + 4] = content[place + 2] | 1, content[place + 3] | 0xC0
    aac.write_bytes(content)
    with soundfile.SoundFile(tmp_path / "many.ogg", "w", 192_000, 255, "VORBIS", format="OGG") as file:
        for _ in range(4):
            file.write(np.zeros((24_000, 255), np.float32))
    subprocess.run([sys.executable, "-c", READERS, opus, aac, tmp_path / "many.ogg"], check=True)


def test_too_many_channels_are_refused_and_blocks_of_many_are_short(tmp_path, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.audio.media._MOST_CHANNELS", 7)
    file = write_media(tmp_path / "a.mov", [np.resize(SPEECH, (900, 8))])
    with pytest.raises(AudioError, match=r"a\.mov: cannot be read as audio: has 8 channels, expected at most 7"):
        read_audio(file, RATE)
    monkeypatch.setattr("u2moe.runtime.audio.reading._MOST_BYTES", 4 * 8 * 1000)
    soundfile.write(tmp_path / "a.wav", np.resize(SPEECH, (2500, 8)), RATE)
    assert list(map(len, read_blocks(tmp_path / "a.wav", RATE, channel=0))) == [1000, 1000, 500, 0]


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_silence_takes_the_place_of_what_is_not_in_the_file(tmp_path, suffix):
    """If an audio track begins after the video, or has a gap, times are those of the file."""
    late, gap, place = 3 * RATE, 10 * RATE, 16_384
    file = write_media(tmp_path / f"a.{suffix}", [SPEECH], with_video=True, gaps={0: late, place: gap})
    with warnings.catch_warnings(action="error"):  # the file is not damaged
        read = read_audio(file, RATE)
    expected = np.concatenate([np.zeros(late), SPEECH[:place], np.zeros(gap), SPEECH[place:]])
    assert abs(len(read) - len(expected)) < 0.15 * RATE  # whole frames, and time stamps in milliseconds
    quiet = np.abs(read) < 1e-3
    assert quiet[: late - RATE // 10].all()
    assert quiet[late + place + RATE // 10 : late + place + gap - RATE // 10].all()
    assert len(read[np.abs(read) > 1e-3]) == pytest.approx(np.count_nonzero(np.abs(SPEECH) > 1e-3), rel=0.02)
    assert abs(duration_of(file) - len(expected) / RATE) < 0.3


def test_titles_that_are_no_utf8_are_left_aside():
    content = encoded(SPEECH[:1600], RATE, "WAV", "PCM_16")
    title = b"LIST\x10\0\0\0INFOINAM\4\0\0\0\xff\xfe\x80\0"
    media = MediaFile(io.BytesIO(content[:36] + title + content[36:]))
    assert media.read(2000).shape == (1600, 1)
    media.close()


def test_a_track_is_chosen(tmp_path):
    second = SPEECH[::-1].copy()
    file = write_media(tmp_path / "a.mkv", [SPEECH, second], with_video=True, languages=["eng", "deu"])
    for track, expected in ((None, SPEECH), (0, SPEECH), (1, second)):
        np.testing.assert_allclose(read_audio(file, RATE, track=track), expected, atol=2**-15)
    part = np.concatenate(list(read_blocks(file, RATE, start=0.5, end=1)))
    np.testing.assert_allclose(part, SPEECH[8000:16000], atol=1e-4)
    with pytest.raises(AudioError, match=r"a\.mkv: .* 2 does not exist: the file has 0 \(eng, flac\), 1 \(deu, flac\)"):
        read_audio(file, RATE, track=2)
    with pytest.raises(AudioError, match="audio track x does not exist"):
        read_audio(file, RATE, track="x")
    soundfile.write(tmp_path / "a.wav", SPEECH, RATE)
    assert len(read_audio(tmp_path / "a.wav", RATE, track=0)) == len(SPEECH)
    with pytest.raises(AudioError, match=r"a\.wav: .* audio track 1 does not exist"):
        read_audio(tmp_path / "a.wav", RATE, track=1)


def test_videos_without_sound_and_lists_of_other_files_are_refused(tmp_path):
    with av.open(tmp_path / "a.mp4", "w") as container:
        video = container.add_stream("mpeg4", rate=5, width=16, height=16, pix_fmt="yuv420p")
        container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        container.mux(video.encode())
    with pytest.raises(AudioError, match=r"a\.mp4: cannot be read as audio: contains no audio track"):
        read_audio(tmp_path / "a.mp4", RATE)
    assert duration_of(tmp_path / "a.mp4") == 0
    # A playlist may name any file or address. An upload must not make a server read them
    write_media(tmp_path / "a.m4a", [SPEECH])
    (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXTINF:2,\na.m4a\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.m4a\n")
    for name in ("a.m3u8", "list.mp4"):
        with pytest.raises(AudioError, match="cannot be read as audio"):
            read_audio(tmp_path / name, RATE)


@pytest.mark.parametrize("suffix", ["m4a", "mkv", "wma"])
def test_what_was_cut_off_gives_what_is_there(tmp_path, suffix):
    options = {"movflags": "faststart"} if suffix == "m4a" else {}
    whole = write_media(tmp_path / f"a.{suffix}", [np.tile(SPEECH, 5)], **options).read_bytes()
    (cut := tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(AudioWarning, match=f"cut.{suffix}: contains .* of the .* s stated in its header: it is trunca"):
        assert 3 * RATE < len(read_audio(cut, RATE)) < 7 * RATE


@pytest.mark.parametrize("form", [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("FLAC", "PCM_16")])
def test_files_in_a_row_are_read_to_the_last(form):
    """libsndfile stops after the first file, and reads a tag after FLAC as audio."""
    speech = np.stack([SPEECH, SPEECH], axis=1)[: (length := len(SPEECH) - 777)]
    first, second = (encoded(speech, RATE, *form) for _ in range(2))
    if form[0] == "MP3":  # with a picture of 2 MB
        first = b"ID3\3\0\0\0\x7f\x7f\x7f" + bytes((1 << 21) - 1) + first
    tagged = first + b"TAG" + bytes(125)
    assert len(read_audio(first, RATE)) == len(read_audio(tagged, RATE)) == length
    for begin in (first, tagged) if form[0] == "MP3" else (first,):
        assert 2 * length <= len(read_audio(begin + second, RATE)) < 2.2 * length


@pytest.mark.parametrize("num_lost", [0, 100])
@pytest.mark.parametrize("order", [1, -1])
def test_mp3_files_without_a_stated_length_are_read_to_their_end(order, num_lost, tmp_path):
    """libsndfile estimates their length from the first frames, which here have the lowest or the highest bit rate."""
    parts = [np.zeros(2 * RATE, np.float32), np.random.default_rng(1).uniform(-0.5, 0.5, 2 * RATE)]
    file = tmp_path / "a.mp3"
    soundfile.write(file, np.concatenate(parts[::order]), RATE, bitrate_mode="VARIABLE")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"Xing", bytes(4))[: len(content) - num_lost])
    found = len(read_audio(file, RATE))
    assert found == pytest.approx(4 * RATE, abs=3000)
    for other in (file.read_bytes(), io.BytesIO(file.read_bytes())):
        assert len(read_audio(other, RATE)) == found
    assert duration_of(file) == 0
    assert sum(map(len, read_blocks(file, RATE, start=1))) == found - RATE
    with pytest.raises(AudioError, match=r"a\.mp3: has no audio from 9 s to its end"):
        list(read_blocks(file, RATE, start=9))
    file.write_bytes(file.read_bytes()[100:])  # a recording of a broadcast begins within a frame
    assert len(read_audio(file, RATE)) == pytest.approx(4 * RATE, abs=6000)


def test_damaged_packets_and_time_stamps_become_silence_but_not_hours(tmp_path):
    content = bytearray(write_media(tmp_path / "a.m4a", [np.tile(SPEECH, 2)]).read_bytes())
    begin = content.index(b"mdat") + 4
    middle = begin + (content.index(b"moov") - begin) // 2
    content[middle : middle + 2000] = bytes([0xFF]) * 2000
    (tmp_path / "b.m4a").write_bytes(content)
    with pytest.warns(AudioWarning, match=r"b\.m4a: \d+ audio packets \(.* s\) are damaged"):
        samples = read_audio(tmp_path / "b.m4a", RATE)
    assert abs(len(samples) - 4 * RATE) < RATE // 10
    content = write_media(tmp_path / "a.ts", [SPEECH]).read_bytes()
    assert len(read_audio(content + bytes(100_000), RATE)) == len(read_audio(content, RATE))  # ffmpeg: "try again"
    data = write_media(tmp_path / "a.mkv", [SPEECH], gaps={20 * 1024: 10**9}).read_bytes()
    media = MediaFile(io.BytesIO(data))
    length = type("Container", (), {"duration": 2_000_000, "start_time": 0, "close": media._container.close})()
    media._container = length
    num_read = 0
    while len(block := media.read(RATE)):
        num_read += len(block)
    assert num_read == pytest.approx(len(SPEECH), abs=2048)


def test_bytes_and_file_objects(tmp_path, recognizer, sound):
    soundfile.write(tmp_path / "a.flac", sound, RATE)
    expected = recognizer.transcribe(tmp_path / "a.flac")
    content = (tmp_path / "a.flac").read_bytes()
    assert (recognizer.transcribe(content), recognizer.transcribe(io.BytesIO(content))) == (expected, expected)
    with (tmp_path / "a.flac").open("rb") as file:
        assert list(recognizer.segments(file)) == expected.segments
    assert recognizer.transcribe(write_media(tmp_path / "a.mkv", [sound]).read_bytes()).text == expected.text
    for other, message in ((b"abc", "3 bytes: cannot be read as audio"), (io.StringIO("a"), "a StringIO: cannot be")):
        with pytest.raises(AudioError, match=message):
            recognizer.transcribe(other)
    with pytest.raises(ValueError, match="sample_rate is only for arrays"):
        recognizer.transcribe(content, RATE)


@pytest.mark.parametrize(("kind", "scale"), [("s16le", 2**15), ("s32le", 2**31), ("f32le", 1)])
def test_raw_audio(tmp_path, kind, scale):
    form, dtype = {"sample_rate": RATE, "encoding": kind}, {"s16le": "<i2", "s32le": "<i4", "f32le": "<f4"}[kind]
    (tmp_path / "a.raw").write_bytes(content := (SPEECH.astype(np.float64) * scale).astype(dtype).tobytes())
    for file in (content, io.BytesIO(content), tmp_path / "a.raw"):
        np.testing.assert_allclose(read_audio(RawAudio(file=file, **form), RATE), SPEECH, atol=2**-15)
    part = np.concatenate(list(read_blocks(RawAudio(file=content, **form), RATE, start=1)))
    np.testing.assert_allclose(part, SPEECH[RATE:], atol=2**-15)
    pairs = RawAudio(file=content, num_channels=2, **form)
    np.testing.assert_allclose(read_audio(pairs, RATE, channel=1), SPEECH[1::2], atol=2**-15)


def test_raw_audio_that_is_refused(tmp_path):
    wrong = {"encoding": "mp3", "num_channels": 0, "file": None, "sample_rate": -5}
    for name, value in (*wrong.items(), ("num_channels", True), ("sample_rate", "x")):
        with pytest.raises(ValueError, match=name):
            RawAudio(**{"file": b"", "sample_rate": RATE, name: value})
    with pytest.raises(AudioError, match=r"nothing\.raw: cannot be read: No such file"):
        read_audio(RawAudio(file=tmp_path / "nothing.raw", sample_rate=RATE), RATE)
    with pytest.raises(AudioError, match="sample rate must be"):
        read_audio(RawAudio(file=b"ab", sample_rate=1), RATE)
    with pytest.raises(AudioError, match="audio track 1 does not exist"):
        read_audio(RawAudio(file=b"ab", sample_rate=RATE), RATE, track=1)
