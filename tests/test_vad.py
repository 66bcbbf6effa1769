"""Voice activity detection by a network with silero's inputs and outputs that measures loudness."""

import itertools
import re
import sys

import numpy as np
import onnx
import pytest
import soundfile
from commands import transcribe
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from silero import write_vad

from u2moe.runtime import BundleError, VadOptions, VoiceActivityDetector, format_transcript

RATE, WINDOW = 16_000, 512


@pytest.fixture(scope="module", params=[False, True], ids=["window", "sequence"])
def vad(request, tmp_path_factory):
    return VoiceActivityDetector(write_vad(tmp_path_factory.mktemp("vad") / "vad.onnx", request.param))


def recording(*parts):
    """Return alternating silence and noise of the given seconds."""
    levels = np.repeat(np.resize([1e-4, 0.1], len(parts)), [round(seconds * RATE) for seconds in parts])
    return (levels * np.random.default_rng(0).standard_normal(len(levels))).astype(np.float32)


def stretches_of(vad, samples, splits=()):
    """Return the start and the samples of each stretch."""
    found = []
    for speech in vad.speech(np.split(samples, np.sort(np.array(splits, int)))):
        if speech.begins:
            found.append((speech.start, []))
        start, pieces = found[-1]
        assert speech.start == start + sum(map(len, pieces))
        pieces.append(speech.samples)
    return [(start, np.concatenate(pieces)) for start, pieces in found]


def test_speech_is_found_with_its_padding_and_at_both_ends(vad):
    samples = recording(1.0, 0.8, 1.5, 0.3, 0.4, 0.5, 0.7)
    found = stretches_of(vad, samples)
    spans = [(start / RATE, (start + len(part)) / RATE) for start, part in found]
    assert np.allclose(spans, [(0.7, 2.1), (3.0, 4.8)], atol=0.04)  # a pause of 0.4 s does not end a stretch
    for start, part in found:
        assert np.array_equal(part, samples[start : start + len(part)])
    samples = recording(0.0, 0.5, 2.0, 0.5)
    (first, head), (second, tail) = stretches_of(vad, samples)
    assert first == 0
    assert np.array_equal(head, samples[: len(head)])
    assert np.array_equal(tail[: len(samples) - second], samples[second:])
    assert not tail[len(samples) - second :].any()
    assert stretches_of(vad, np.zeros(0, np.float32)) == stretches_of(vad, recording(3.0)) == []


@settings(max_examples=20)
@given(st.lists(st.integers(0, 70_000), max_size=6))
def test_portions_change_nothing_and_stretches_are_apart(vad, splits):
    samples = recording(0.9, 0.4, 0.65, 0.1, 0.65, 0.5, 0.3, 0.2, 0.75)
    expected, found = stretches_of(vad, samples), stretches_of(vad, samples, splits)
    assert len(expected) == 3
    assert [start for start, _ in found] == [start for start, _ in expected]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))
    assert all(start + len(part) <= following for (start, part), (following, _) in itertools.pairwise(found))


def test_another_rate_is_refused(vad, recognizer, monkeypatch):
    monkeypatch.setattr(vad, "sample_rate", 8000)
    with pytest.raises(ValueError, match="needs audio at 8000 Hz, but the model needs 16000 Hz"):
        recognizer.transcribe(np.zeros(16_000, np.float32), vad=vad)


def test_what_is_no_vad(tmp_path, bundle):
    (tmp_path / "empty").touch()
    (tmp_path / "noise").write_bytes(b"no onnx")
    model = onnx.load(write_vad(tmp_path / "shape"))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("input", TensorProto.FLOAT, [None, 512]))
    onnx.save(model, tmp_path / "shape")
    refusal = "(no such file|onnxruntime refuses it|is not silero VAD)"
    for file in (*(tmp_path / name for name in ("none", "empty", "noise", "shape")), bundle.path / "ctc.onnx"):
        with pytest.raises(BundleError, match=f"{re.escape(str(file))}: {refusal}"):
            VoiceActivityDetector(file)


def test_options_that_cannot_be():
    for name, value in (("end_threshold", 0.6), ("padding", 0.4), ("threshold", 1.0)):
        with pytest.raises(ValueError, match=name):
            VadOptions(**{name: value})


def test_words_are_those_of_each_stretch_at_its_time(vad, recognizer, sound):
    """Each stretch is recognised separately, in order. Its times are those of the recording."""
    quiet = 1e-5 * np.random.default_rng(1).standard_normal(2 * RATE)
    samples = np.concatenate([quiet, sound, quiet, sound[::-1], quiet]).astype(np.float32)
    transcript = recognizer.transcribe(samples, vad=vad)
    assert transcript.duration == len(samples) / RATE
    expected = []
    for start, part in stretches_of(vad, samples):
        for segment in recognizer.transcribe(part).segments:
            expected += [(word.word, word.start + start / RATE, word.end + start / RATE) for word in segment.words]
    found = [(word.word, word.start, word.end) for segment in transcript.segments for word in segment.words]
    assert len(found) == len(expected) > 0
    assert [word for word, *_ in found] == [word for word, *_ in expected]
    assert np.allclose([times for _, *times in found], [times for _, *times in expected], atol=0.002)
    assert [segment.segment for segment in transcript.segments] == list(range(len(transcript.segments)))
    for segment in transcript.segments:
        assert (segment.start, segment.end) == (segment.words[0].start, segment.words[-1].end)


def test_the_command_takes_a_file_or_a_package_not_imported(bundle, recognizer, sound, tmp_path, capsys, monkeypatch):
    clip, file, quiet = tmp_path / "clip.wav", write_vad(tmp_path / "vad.onnx"), np.zeros(3 * RATE, np.float32)
    soundfile.write(clip, np.concatenate([quiet, sound, quiet]), RATE)
    expected = recognizer.transcribe(clip, vad=VoiceActivityDetector(file))
    assert expected != recognizer.transcribe(clip)
    assert transcribe(bundle, "-f", "json", "--vad", file, clip) == 0
    assert capsys.readouterr().out == format_transcript(expected, "json", name=str(clip))
    monkeypatch.setitem(sys.modules, "silero_vad", None)  # as if it were not installed
    missing = "silero-vad is not installed: run pip install --no-deps silero-vad"
    for options, message in (([file, "--stream"], "leave out --stream"), (["silero"], missing)):
        assert transcribe(bundle, "--vad", *options, clip) == 1
        assert message in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "silero_vad")
    package = tmp_path / "silero_vad"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('torch')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BundleError, match="silero-vad is not installed"):
        VoiceActivityDetector()
    write_vad(package / "data" / "silero_vad.onnx")
    assert (transcribe(bundle, "--vad", "silero", clip), capsys.readouterr().out) == (0, expected.text + "\n")
    (package / "data" / "silero_vad_16k_sequence.onnx").touch()  # preferred, but here not a network
    with pytest.raises(BundleError, match="sequence"):
        VoiceActivityDetector()
