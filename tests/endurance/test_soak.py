"""Hours of audio and many streams: constant memory, and no frame lost or repeated at cuts of a long recording."""

import dataclasses
import os

import numpy as np
import pytest
import soundfile
from cuts import cuts_of, logged
from damage import resident_mb

from u2moe.runtime import DecodingOptions, EndpointConfig, EndpointRule, Recognizer
from u2moe.runtime.audio.files import find_audio
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.decoding.stream_state import StreamState
from u2moe.runtime.model.encoder import Windows

pytestmark = pytest.mark.slow

RATE = 16_000
PLAIN = DecodingOptions(beam_size=10, language_model="none")
"""Options for recognising a segment again from its own samples."""
HOURS = float(os.environ.get("U2MOE_TEST_HOURS", "1"))
STREAMED = DecodingOptions(chunk_size=16, num_left_chunks=4, endpoint=EndpointConfig())
MOST_GROWTH = 1.1


@pytest.fixture(scope="module")
def clips():
    return [read_audio(clip, RATE) for clip in find_audio([DEMO_FOLDER / "clips"])]


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
    recognizer, utterances = logged(Recognizer.from_pretrained(options=STREAMED))
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
    cuts = cuts_of(recognizer, utterances, round(stream.duration * RATE))
    assert (cuts.num_lost, cuts.num_doubled) == (0, 0)
    assert cuts.num_utterances >= count
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
    check_long_file(clips, 30.0, tmp_path / "long.wav", dataclasses.replace(PLAIN, endpoint=ENDS[ends]))


@pytest.mark.endurance
@pytest.mark.timeout(7200)
def test_a_file_of_hours(clips, tmp_path):
    check_long_file(clips, 3600 * HOURS, tmp_path / "long.flac", PLAIN)


def check_long_file(clips, seconds, file, options):
    num_samples, measured = write_long(file, clips, seconds), []
    recognizer, utterances = logged(Recognizer.from_pretrained(options=options))
    transcript = recognizer.transcribe(file, on_progress=lambda second: measured.append((second, resident_mb())))
    found = cuts_of(recognizer, utterances, num_samples, file)
    assert found.num_utterances >= 4
    assert (found.num_lost, found.num_doubled, found.num_different) == (0, 0, 0)
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
    num_samples = write_long(tmp_path / "long.wav", clips, 30.0)
    recognizer, utterances = logged(Recognizer.from_pretrained(options=PLAIN))
    recognizer.transcribe(tmp_path / "long.wav")
    found = cuts_of(recognizer, utterances, num_samples, tmp_path / "long.wav")
    assert found.num_different >= 2
    assert (found.num_lost > 0) == (fault in (losing, without_the_last_frame))
