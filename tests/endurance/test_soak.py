"""Hours of audio and many streams: constant memory, and no frame lost or repeated at cuts of a long recording. Each
utterance is encoded and decoded again from its samples in the recording. If the stream had dropped, repeated or moved
frames, or mixed up utterances, the words would differ."""

import dataclasses
import os

import numpy as np
import pytest
import soundfile
from damage import resident_mb

from u2moe.runtime import DecodingOptions, EndpointConfig, EndpointRule, Recognizer, ctc_prefix_beam_search
from u2moe.runtime.audio.files import find_audio
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.decoding.pipeline import Observer
from u2moe.runtime.decoding.rescoring import attention_rescoring
from u2moe.runtime.decoding.stream_state import StreamState
from u2moe.runtime.model.encoder import Windows
from u2moe.runtime.model.features import fbank

pytestmark = pytest.mark.slow

RATE = 16_000
FRAME_LEN, SHIFT_LEN = 400, 160
"""Samples in a feature frame of the demo model, and from one frame to the next."""
PLAIN = DecodingOptions(beam_size=10, language_model="none")
"""Options for recognising a segment again from its own samples."""
HOURS = float(os.environ.get("U2MOE_TEST_HOURS", "1"))
STREAMED = DecodingOptions(chunk_size=16, num_left_chunks=4, endpoint=EndpointConfig())
MOST_GROWTH = 1.1


@pytest.fixture(scope="module")
def clips():
    return [read_audio(clip, RATE) for clip in find_audio([DEMO_FOLDER / "clips"])]


def logged(options):
    """Return the demo's recogniser, without padding, and a list to which it appends the utterances that it concludes:
    (first frame of the last window, its number of feature frames, first encoder frame, their number, text, times)."""
    log = []

    def concluded(utterance):
        if utterance.num_frames:
            window = utterance.window_start, utterance.window_len
            log.append((*window, utterance.start, utterance.num_frames, utterance.result.text, utterance.result.times))

    options = dataclasses.replace(options, padding_s=0.0)
    demo = Recognizer.from_pretrained()
    return Recognizer(demo.bundle, demo.model, options, observer=Observer(concluded=concluded)), log


def lost_and_doubled(recognizer, utterances, num_samples):
    """Return the numbers of encoder frames in no utterance, and in two."""
    config = recognizer.model.config
    position = num_lost = num_doubled = 0
    for _, _, start, num_frames, *_ in utterances:
        num_lost += max(start - position, 0)
        num_doubled += max(position - start, 0)
        position = start + num_frames
    num_features = (num_samples - FRAME_LEN) // SHIFT_LEN + 1
    return num_lost + max((num_features - config.window) // config.subsampling_rate + 1 - position, 0), num_doubled


def num_different(recognizer, utterances, file):
    """Return the number of utterances whose text or times differ when recognised alone, with full context, from only
    their samples: features, encoder, search and rescoring."""
    model, manifest, count = recognizer.model, recognizer.bundle.manifest, 0
    for window_start, window_len, start, num_frames, *expected in utterances:
        with soundfile.SoundFile(file) as source:
            source.seek(window_start * model.config.subsampling_rate * SHIFT_LEN)
            samples = source.read((window_len - 1) * SHIFT_LEN + FRAME_LEN, dtype="float32")
        begin = start - window_start
        output = model.encode(fbank(samples, manifest.features))[begin : begin + num_frames]
        found = ["", []]  # the utterance is not in its window
        if len(output):
            hypotheses = ctc_prefix_beam_search(model.ctc(output), recognizer.options.beam_size, model.config.blank)
            scores = model.token_scores(output, [hypothesis.tokens for hypothesis in hypotheses])
            best = attention_rescoring(hypotheses, scores, manifest.decoding.weights())[0].hypothesis
            times = [round((start + time) * manifest.frame_s, 3) for time in best.times]
            found = [recognizer.vocabulary.text(best.tokens), times]
        count += found != expected
    return count


def write_long(file, clips, seconds):
    """Write clips separated by noise, since microphones never record digital silence; return the number of samples."""
    random, num_samples = np.random.default_rng(0), 0
    with soundfile.SoundFile(file, "w", RATE, 1, "PCM_16") as target:
        while num_samples < seconds * RATE:
            clip = clips[random.integers(len(clips))]
            noise = 1e-4 * random.standard_normal(int(random.uniform(0.3, 2.0) * RATE))
            target.write(np.concatenate([clip, noise]))  # FLAC does not report a position
            num_samples += len(clip) + len(noise)
    return num_samples


def in_portions(samples, random):
    return np.split(samples, np.sort(random.integers(0, len(samples) + 1, len(samples) // RATE)))


@pytest.mark.endurance
@pytest.mark.timeout(7200)
def test_a_stream_goes_on(clips):
    seconds = 3600 * HOURS
    recognizer, utterances = logged(STREAMED)
    stream, random = recognizer.create_stream(), np.random.default_rng(0)
    count, last_end, early_mb = 0, 0.0, 0.0
    while stream.duration < seconds:
        for portion in in_portions(clips[random.integers(len(clips))], random):
            stream.accept_waveform(RATE, portion)
            recognizer.decode_streams([stream])
            for segment in stream.take_segments():
                assert (segment.segment, segment.start >= last_end) == (count, True)
                count, last_end = count + 1, segment.end
        early_mb = early_mb or (resident_mb() if stream.duration > seconds / 10 else 0.0)
    stream.input_finished()
    recognizer.decode_streams([stream])
    assert lost_and_doubled(recognizer, utterances, round(stream.duration * RATE)) == (0, 0)
    assert len(utterances) >= count
    assert resident_mb() < MOST_GROWTH * early_mb


@pytest.mark.endurance
def test_streams_together_hear_what_each_hears_alone_in_other_portions(clips):
    recognizer, random = Recognizer.from_pretrained(options=STREAMED), np.random.default_rng(0)
    sounds = [np.concatenate([clips[index] for index in random.integers(len(clips), size=3)]) for _ in range(64)]

    def heard(sounds, portions):
        streams = [recognizer.create_stream() for _ in sounds]
        for step in range(max(map(len, portions))):
            for stream, own in zip(streams, portions, strict=True):
                if step < len(own):
                    stream.accept_waveform(RATE, own[step])
            recognizer.decode_streams(streams)
        for stream in streams:
            stream.input_finished()
        recognizer.decode_streams(streams)
        return [[(segment.text, segment.times) for segment in stream.take_segments()] for stream in streams]

    together = heard(sounds, [np.array_split(sound, 7) for sound in sounds])
    assert [heard([sound], [in_portions(sound, random)])[0] for sound in sounds] == together


# Pauses; windows that end within speech; utterances cut between words because they are too long; many in a window.
ENDS = {
    "pauses": EndpointConfig(),
    "windows": EndpointConfig(rule1=None, rule2=None, rule3=EndpointRule(min_utterance_length=1000), pause=None),
    "long utterances": EndpointConfig(rule3=EndpointRule(min_utterance_length=3.0), pause=None),
}


@pytest.fixture
def short_windows(monkeypatch):
    monkeypatch.setattr("u2moe.runtime.decoding.stream_state.LONGEST_WINDOW_S", 8.0)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.usefixtures("short_windows")
def test_every_piece_says_what_is_in_its_samples(clips, ends, tmp_path):
    check_long_file(clips, 20.0, tmp_path / "long.wav", dataclasses.replace(PLAIN, endpoint=ENDS[ends]))


@pytest.mark.endurance
@pytest.mark.timeout(7200)
def test_a_file_of_hours(clips, tmp_path):
    check_long_file(clips, 3600 * HOURS, tmp_path / "long.flac", PLAIN)


def check_long_file(clips, seconds, file, options):
    num_samples, measured = write_long(file, clips, seconds), []
    recognizer, utterances = logged(options)
    transcript = recognizer.transcribe(file, on_progress=lambda second: measured.append((second, resident_mb())))
    assert len(utterances) >= 4
    assert lost_and_doubled(recognizer, utterances, num_samples) == (0, 0)
    assert num_different(recognizer, utterances, file) == 0
    if seconds >= 600:
        early_mb = next(mb for second, mb in measured if second >= transcript.duration / 10)
        assert measured[-1][1] < MOST_GROWTH * early_mb


def losing(put_back):
    return lambda self, features: put_back(self, features[40:])


def repeating(put_back):
    return lambda self, features: put_back(self, np.concatenate([features[:40], features]))


def without_the_last_frame(advance):
    return lambda self, frames, caches: advance(self, frames[:-1], caches)


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [(Windows, "put_back", losing), (Windows, "put_back", repeating), (StreamState, "advance", without_the_last_frame)],
)
@pytest.mark.usefixtures("short_windows")
def test_what_is_lost_or_doubled_at_cuts_is_found(clips, tmp_path, owner, name, fault, monkeypatch):
    monkeypatch.setattr(owner, name, fault(getattr(owner, name)))
    num_samples = write_long(tmp_path / "long.wav", clips, 20.0)
    recognizer, utterances = logged(PLAIN)
    recognizer.transcribe(tmp_path / "long.wav")
    assert num_different(recognizer, utterances, tmp_path / "long.wav") >= 2
    num_lost, _ = lost_and_doubled(recognizer, utterances, num_samples)
    assert (num_lost > 0) == (fault in (losing, without_the_last_frame))
