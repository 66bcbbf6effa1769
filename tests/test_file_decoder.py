"""The decoder process: its results equal those of reading in this process, and crashes do not leave it."""

import contextlib
import io
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from damaged_audio import encoded

from u2moe.runtime.audio import decoder
from u2moe.runtime.audio.decoder import DecoderError, FileDecoder
from u2moe.runtime.audio.reading import duration_of, read_blocks
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.errors import AudioError, TruncatedAudioError

RATE = 16_000
CLIP = DEMO_FOLDER / "clips" / "command.flac"
HAS_LIMITS = sys.platform != "win32"

ODD = """
import os
import tempfile
import u2moe.runtime.audio.decoder as decoder
read = decoder.read_blocks
faults = {
    "exit": lambda: os._exit(7),
    "spin": lambda: any(iter(int, 1)),
    "memory": lambda: bytearray(2 << 30),
    "descriptors": lambda: [open(os.devnull) for _ in range(1000)],
    "disk": lambda: open(os.path.join(tempfile.gettempdir(), "u2moe-test"), "wb", 0).write(bytes(1000)),
    "print": lambda: (print("noise", flush=True), os.write(2, b"noise")),
}

def odd(file, *args, **kwargs):
    if name := getattr(file, "name", ""):
        file.read(10)
        file.seek(0)
    faults.get(name, int)()
    return read(file, *args, **kwargs)

decoder.read_blocks = odd
decoder._CPU_S = -1.5
decoder.main()
"""
"""Code of a decoder process in which the name of a file determines the fault."""


@pytest.fixture
def own():
    own = FileDecoder()
    yield own
    own.stop()


def read(own, content, name="a"):
    return np.concatenate([np.zeros(0, np.float32), *own.read(io.BytesIO(content), name, RATE)])


def test_samples_and_errors_are_those_of_reading_here(own):
    sound = encoded(np.random.default_rng(0).normal(0, 0.1, (12 * 44_100, 2)), 44_100, "WAV", "PCM_16")
    for content in (CLIP.read_bytes(), sound):
        np.testing.assert_array_equal(read(own, content), np.concatenate(list(read_blocks(content, RATE))))
        assert own.stated_s == duration_of(io.BytesIO(content))
    assert len(next(own.read(io.BytesIO(sound), "a", RATE))) > 9 * RATE  # a buffer of ten seconds; the rest is left
    sound = encoded(np.zeros(RATE, np.float32), RATE, "WAV", "PCM_16")
    with pytest.raises(TruncatedAudioError, match=r"^cut\.wav: contains 11\d+ of the 32000 bytes"):
        read(own, sound[:12_000], "cut.wav")

    class Broken(io.BytesIO):
        def read(self, *_):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        next(own.read(Broken(b"abc"), "a", RATE))
    assert len(read(own, CLIP.read_bytes())) > RATE


FAULTS = {"exit": r"the decoder process died \(7\)"} | ({
    "spin": "decoding takes too long", "memory": "decoding takes too much memory",
    "descriptors": "the decoder process died", "disk": "the decoder process died",
} if HAS_LIMITS else {})  # fmt: skip


@pytest.mark.slow
def test_what_a_file_does_to_the_process_ends_there(own, monkeypatch):
    monkeypatch.setattr(decoder, "_CODE", ODD)
    for name, told in FAULTS.items():
        with pytest.raises(DecoderError, match=f"{name}: cannot be decoded: {told}"):
            read(own, CLIP.read_bytes(), name)
    assert len(read(own, CLIP.read_bytes())) > RATE


@pytest.mark.skipif(not HAS_LIMITS, reason="Windows has no limits")
def test_a_process_of_little_starts_all_the_same(own, monkeypatch):
    """The system's limits may already be lower than ours."""
    few = "import resource\nfor kind, most in ((resource.RLIMIT_AS, 400 << 20), (resource.RLIMIT_CPU, 4), "
    few += "(resource.RLIMIT_NOFILE, 20)):\n    resource.setrlimit(kind, (most, most))\n"
    monkeypatch.setattr(decoder, "_CODE", few + decoder._CODE)
    assert len(read(own, CLIP.read_bytes())) > RATE


def test_what_stands_still_is_ended(own, monkeypatch):
    monkeypatch.setattr(decoder, "_CODE", ODD.replace("-1.5", "1000"))
    monkeypatch.setattr(decoder, "_PATIENCE_S", 1.0)
    with pytest.raises(DecoderError, match="spin: cannot be decoded: decoding takes too long"):
        read(own, CLIP.read_bytes(), "spin")


@pytest.mark.slow
def test_headers_without_end_take_limited_time(own, monkeypatch):
    """libsndfile takes seconds for empty chunks. Their number is limited before the audio, and the time after it."""
    monkeypatch.setattr(decoder, "_CODE", ODD)
    chunks, sound = b"junk\0\0\0\0" * (3 << 20), encoded(np.zeros(RATE, np.float32), RATE, "WAV", "PCM_16")
    begin = os.times()
    with pytest.raises(AudioError, match="a: has more than 1000 chunks before its audio"):
        read(own, sound[:36] + chunks + sound[36:])
    with contextlib.suppress(DecoderError):  # depends on the speed of the machine
        read(own, sound + chunks)
    assert os.times().children_user - begin.children_user < 4


def test_a_process_that_ended_between_files_is_no_files_fault(own):
    before = read(own, CLIP.read_bytes())
    own._process.kill()
    own._process.wait()
    np.testing.assert_array_equal(read(own, CLIP.read_bytes()), before)
    blocks = own.read(io.BytesIO(encoded(np.zeros(12 * RATE, np.float32), RATE, "WAV", "PCM_16")), "a", RATE)
    next(blocks)
    own._process.kill()
    own._process.wait()
    with pytest.raises(DecoderError):  # instead of the end of the file
        next(blocks)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_has_no_files_secrets_or_output_of_this_one(own, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("U2MOE_API_KEY", "secret")
    monkeypatch.setattr(decoder, "_CODE", ODD)
    with (tmp_path / "open").open("wb") as file:
        os.set_inheritable(file.fileno(), True)  # noqa: FBT003 - a system function
        assert len(read(own, CLIP.read_bytes(), "print")) > RATE
        place = Path(f"/proc/{own._process.pid}")
        assert b"secret" not in (place / "environ").read_bytes()
        inherited = {str(link.readlink()) for link in (place / "fd").iterdir()}
        assert str(tmp_path / "open") not in inherited
        assert all(each.startswith("pipe:") or each == os.devnull for each in inherited)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # signals to the process group, such as Ctrl-C
        os.kill(own._process.pid, number)
    process = own._process
    assert len(read(own, CLIP.read_bytes())) > RATE
    assert own._process is process
    own.stop()
    assert process.returncode == -signal.SIGKILL
    assert capfd.readouterr() == ("", "")
    with pytest.raises(DecoderError, match="has ended"):
        read(own, CLIP.read_bytes())
