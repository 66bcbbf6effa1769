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
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.decoding.pipeline import Observer
from u2moe.runtime.decoding.rescoring import attention_rescoring
from u2moe.runtime.decoding.stream_state import StreamState
from u2moe.runtime.model.encoder import Windows
from u2moe.runtime.model.features import fbank
from u2moe.runtime.text.word_errors import words

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


@pytest.mark.parametrize(("owner", "name", "changed", "is_lost"), [
    (Windows, "put_back", lambda features: features[40:], True),
    (Windows, "put_back", lambda features: np.concatenate([features[:40], features]), False),
    (StreamState, "advance", lambda frames: frames[:-1], True),
])  # fmt: skip
@pytest.mark.usefixtures("short_windows")
def test_what_is_lost_or_doubled_at_cuts_is_found(clips, tmp_path, owner, name, changed, is_lost, monkeypatch):
    work = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, frames, *more: work(self, changed(frames), *more))
    num_samples = write_long(tmp_path / "long.wav", clips, 20.0)
    recognizer, utterances = logged(PLAIN)
    recognizer.transcribe(tmp_path / "long.wav")
    assert num_different(recognizer, utterances, tmp_path / "long.wav") >= 2
    num_lost, _ = lost_and_doubled(recognizer, utterances, num_samples)
    assert (num_lost > 0) == is_lost


# -------------------- a video of several hours with two audio tracks

CODECS = {"mp4": "aac", "mkv": "libopus"}
VIDEO_RATE, FRAMES_PER_S, VIDEO_HOURS = 48_000, 5, 3


def write_minute(av, file, codec):
    """Write a minute of noise video with two tracks, silence and the clips; return its seconds and spoken words."""
    recordings = read_recordings(DEMO_FOLDER / "clips" / "transcripts.txt")
    pause = np.zeros(2 * VIDEO_RATE, np.float32)
    spoken = np.tile(
        np.concatenate([part for item in recordings for part in (read_audio(item.path, VIDEO_RATE), pause)]), 4
    )
    random = np.random.default_rng(0)
    with av.open(file, "w") as container:
        video = container.add_stream("mpeg4", rate=FRAMES_PER_S, width=64, height=48, pix_fmt="yuv420p")
        tracks = [container.add_stream(codec, rate=VIDEO_RATE, layout="mono") for _ in range(2)]
        for _ in range(int(len(spoken) / VIDEO_RATE * FRAMES_PER_S)):
            image = random.integers(0, 255, (48, 64, 3), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for track, samples in zip(tracks, (0 * spoken, spoken), strict=True):
            resampler = av.AudioResampler(track.format.name, "mono", VIDEO_RATE, track.codec_context.frame_size)
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.rate = VIDEO_RATE
            for part in resampler.resample(frame):
                container.mux(track.encode(part))
            container.mux(track.encode())
        container.mux(video.encode())
    return len(spoken) / VIDEO_RATE, 4 * sum(len(words(item.transcript)) for item in recordings)


def write_video(av, file, codec):
    minute = file.with_name(f"minute{file.suffix}")
    minute_s, num_words = write_minute(av, minute, codec)
    count = round(3600 * VIDEO_HOURS / minute_s)
    with av.open(file, "w") as container:
        tracks = None
        for number in range(count):
            with av.open(minute) as source:
                tracks = tracks or [container.add_stream_from_template(stream) for stream in source.streams]
                for packet in source.demux():
                    if packet.pts is not None and packet.dts is not None and packet.time_base:
                        shift = round(number * minute_s / packet.time_base)
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = tracks[packet.stream_index]
                        container.mux(packet)
    return count * num_words


@pytest.mark.endurance
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("suffix", CODECS)
def test_the_second_track_is_heard_in_flat_memory(suffix, tmp_path):
    num_words = write_video(pytest.importorskip("av"), tmp_path / f"video.{suffix}", CODECS[suffix])
    memory, options = [], {"track": 1, "on_progress": lambda seconds: memory.append((seconds, resident_mb()))}
    segments = Recognizer.from_pretrained().segments(tmp_path / f"video.{suffix}", **options)
    num_recognised = sum(len(words(segment.text)) for segment in segments)
    assert num_recognised == pytest.approx(num_words, rel=0.1)  # the other track is silent
    early_mb = next(mb for seconds, mb in memory if seconds > 360 * VIDEO_HOURS)
    assert memory[-1][1] < MOST_GROWTH * early_mb
