"""The C++ program beside the Python runtime, built with sanitizers: what it prints, and what it refuses."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from manifests import edit_manifest

from u2moe.runtime import DecodingOptions, EndpointConfig, Recognizer

SOURCE = Path(__file__).parents[1] / "examples" / "cpp"
HEADER = Path("/usr/include/onnxruntime/onnxruntime_cxx_api.h")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not HEADER.is_file() or shutil.which("cmake") is None,
        reason="needs onnxruntime's C++ headers and cmake: apt-get install libonnxruntime-dev cmake g++",
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Built with the sanitizers: an invalid access or undefined behaviour ends it with an error."""
    folder = tmp_path_factory.mktemp("build")
    for command in (["cmake", "-B", folder, "-DSANITIZE=ON", SOURCE], ["cmake", "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning:" not in done.stderr
    return folder / "u2moe_transcribe"


def run(program, *arguments, data=None):
    return subprocess.run([program, *map(str, arguments)], input=data, capture_output=True, check=False)


@pytest.fixture(scope="module")
def talk(sound, tmp_path_factory):
    """Long enough that the third rule cuts it within speech."""
    file = tmp_path_factory.mktemp("talk") / "talk.wav"
    soundfile.write(file, np.tile(sound, 6), 16_000, subtype="PCM_16")
    return file


def test_it_prints_what_python_gives(program, bundle, model, talk):
    samples, _ = soundfile.read(talk, dtype="int16")
    options = DecodingOptions(chunk_size=16, num_left_chunks=4, endpoint=EndpointConfig())
    recognizer = Recognizer(bundle, model, options)
    stream = recognizer.create_stream()
    stream.accept_waveform(16_000, samples)
    stream.input_finished()
    recognizer.decode_streams([stream])
    expected = stream.take_segments()
    assert len(expected) > 1
    raw = run(program, "--json", "--raw", "--left-chunks", 4, bundle.path, data=samples.tobytes())
    wav = run(program, "--json", "--left-chunks", 4, bundle.path, talk)
    piped = run(program, "--json", "--left-chunks", 4, bundle.path, "-", data=talk.read_bytes())
    assert (raw.returncode, wav.returncode, piped.returncode) == (0, 0, 0), raw.stderr[-2000:]
    found, *others = (
        [{**json.loads(line), "file": None} for line in done.stdout.splitlines()] for done in (wav, raw, piped)
    )
    assert others == [found, found]
    several = run(program, "--json", "--left-chunks", 4, bundle.path, talk, talk).stdout.splitlines()
    assert several == wav.stdout.splitlines() * 2
    assert len(found) == len(expected)
    for theirs, ours in zip(found, expected, strict=True):
        assert (theirs["text"], theirs["tokens"], theirs["segment"]) == (ours.text, ours.tokens, ours.segment)
        assert theirs["times"] == ours.times
        assert [item["tokens"] for item in theirs["nbest"]] == [item.tokens for item in ours.nbest]
        words = [(word["word"], word["start"], word["end"]) for word in theirs["words"]]
        assert words == [(word.word, word.start, word.end) for word in ours.words]
        for word, other in zip(theirs["words"], ours.words, strict=True):
            assert word["confidence"] == pytest.approx(other.confidence, abs=1e-3)


def test_it_prints_text_with_times(program, bundle, model, talk):
    lines = run(program, bundle.path, talk).stdout.decode().splitlines()
    options = DecodingOptions(chunk_size=16, endpoint=EndpointConfig())
    segments = Recognizer(bundle, model, options).transcribe(talk).segments
    assert lines == [f"{segment.start:.2f} {segment.end:.2f} {segment.text}" for segment in segments]


def test_nothing_and_little(program, bundle):
    for num_samples in (0, 399):
        done = run(program, "--raw", bundle.path, data=bytes(2 * num_samples))
        assert (done.returncode, done.stdout) == (0, b""), done.stderr[-2000:]


def test_what_is_wrong_is_said(program, bundle, talk, tmp_path):
    def problem(*arguments, data=None):
        done = run(program, *arguments, data=data)
        assert done.returncode in (1, 2)
        return done.stderr.decode().splitlines()

    soundfile.write(tmp_path / "other.wav", np.zeros(800), 8000)
    assert "at 8000 Hz, expected one of 16 bits at 16000 Hz" in problem(bundle.path, tmp_path / "other.wav")[-1]
    assert "is not a WAV file" in problem(bundle.path, "-", data=b"RIFF")[-1]
    assert "cannot be read" in problem(tmp_path / "none", talk)[-1]
    assert any("unknown option --fast" in line for line in problem("--fast", bundle.path))
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle.path, damaged)
    content = bytearray((damaged / "ctc.onnx").read_bytes())
    content[100] ^= 1
    (damaged / "ctc.onnx").write_bytes(content)
    assert "ctc.onnx: sha256 is" in problem(damaged, talk)[-1]
    edit_manifest(damaged, lambda manifest: manifest["model"].pop("vocab_size"))
    assert "field 'vocab_size' is missing" in problem(damaged, talk)[-1]
    (damaged / "bundle.json").write_text('{"format": "u2moe-bundle", ')
    assert "is not valid JSON" in problem(damaged, talk)[-1]
