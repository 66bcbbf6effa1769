"""Endpoints, long recordings and many streams, on a toy model that hears tones as words, and on the tiny one."""

import dataclasses
import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from u2moe.quantize import RECIPES, quantize_bundle
from u2moe.runtime import DecodingOptions, EndpointConfig, EndpointRule, ProviderError, Recognizer, StreamError
from u2moe.runtime.encoder import Encoder
from u2moe.runtime.manifest import DecodingConfig, FeatureConfig, Manifest, ModelConfig, TextConfig
from u2moe.runtime.text import Vocabulary

RATE = 16_000
TONES = {"A": 500, "B": 1000, "C": 2000, "D": 4000}
SYMBOLS = ["<blank>", *(f"\u2581{word}" for word in TONES), "<sos/eos>"]
CONFIG = ModelConfig(
    streaming=True, convolution=False, decoder="none", feature_size=80, output_size=80, num_blocks=1, num_kv_heads=1,
    kv_dim=2, conv_dim=0, conv_cache=0, vocab_size=len(SYMBOLS), subsampling_rate=4, right_context=6,
    static_chunk_size=0, blank=0, sos=5, eos=5,
)  # fmt: skip
MANIFEST = Manifest(
    model=CONFIG, features=FeatureConfig(), text=TextConfig(tokenizer="bpe"), decoding=DecodingConfig(),
    producer="test", files={},
)  # fmt: skip


class ToySession:
    """In the place of the encoder: an encoder frame is the mean of its seven frames, whatever the caches hold."""

    def __init__(self):
        self.batches, self.durations = [], []
        self.fails = False

    def run(self, feeds):
        if self.fails:
            raise ProviderError("the device is gone")
        chunk, lengths = feeds["chunk"], feeds["chunk_lens"]
        self.batches.append(len(chunk))
        self.durations.append(chunk.shape[1] / 100)
        time = (chunk.shape[1] - 7) // 4 + 1
        output = np.stack([chunk[:, 4 * i : 4 * i + 7].mean(axis=1) for i in range(time)], axis=1)
        cache, num = feeds["att_cache"], feeds["required_cache_size"]
        # What is cached are ones, so that padding shows: it must be where positions are negative, and only there.
        following = np.concatenate([cache, np.ones((1, len(chunk), 1, time, 2), np.float32)], axis=3)
        following = following[:, :, :, max(following.shape[3] - num, 0) if num >= 0 else 0 :]
        for row, offset in enumerate(feeds["offset"].tolist()):
            positions = offset + np.arange(-cache.shape[3], 0)
            assert cache[0, row, 0, :, 0].tolist() == (positions >= 0).tolist()
        return {"output": output, "output_lens": (lengths - 7) // 4 + 1, "r_att_cache": following}


class ToyModel:
    """Tones of 200 ms and more are words, the loudest of several; all else is blank."""

    def __init__(self, threshold=19.0):
        self.threshold = threshold
        self.manifest, self.config, self.has_decoder = MANIFEST, CONFIG, False
        self.session = ToySession()
        self.encoder = Encoder(self.session, CONFIG)
        self.bins = [round(1127 * np.log1p(f / 700) / (1127 * np.log1p(8000 / 700) / 81)) - 1 for f in TONES.values()]

    def ctc(self, encoder_out):
        scores = np.full((len(encoder_out), CONFIG.vocab_size), -8.0)
        scores[:, 0] = 0.0
        bands = np.stack([encoder_out[:, band - 1 : band + 2].max(axis=1) for band in self.bins], axis=1)
        heard = (bands > self.threshold) & (bands == bands.max(axis=1, keepdims=True))
        scores[:, 1 : len(self.bins) + 1] = np.where(heard, 4.0, -8.0)
        return (scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))).astype(np.float32)


class ToyBundle:
    manifest = MANIFEST
    vocabulary = Vocabulary(SYMBOLS, MANIFEST.text)


@pytest.fixture
def toy():
    return Recognizer(ToyBundle(), ToyModel())


def say(words, pauses, tone_s=0.3):
    """Tones with pauses before each, and the times at which they begin."""
    parts, starts, time = [], [], 0.0
    for word, pause in zip(words, pauses, strict=True):
        starts.append(time + pause)
        parts += [
            np.zeros(round(pause * RATE)),
            0.3 * np.sin(np.arange(round(tone_s * RATE)) * 2 * np.pi * TONES[word] / RATE),
        ]
        time += pause + tone_s
    return np.concatenate([*parts, np.zeros(RATE // 2)]).astype(np.float32), starts


RULES = EndpointConfig(
    rule1=EndpointRule(min_trailing_silence=2.4),
    rule2=EndpointRule(must_contain_nonsilence=True, min_trailing_silence=0.8),
    rule3=EndpointRule(min_utterance_length=6.0),
)
CHUNKED = DecodingOptions(chunk_size=16, num_left_chunks=2, endpoint=RULES)
OPTIONS = [
    CHUNKED,
    dataclasses.replace(CHUNKED, num_left_chunks=-1),
    dataclasses.replace(CHUNKED, num_left_chunks=0, chunk_size=5),
    dataclasses.replace(CHUNKED, search="ctc_greedy"),
    DecodingOptions(endpoint=RULES),
]


def hear(recognizer, samples, splits=(), options=CHUNKED):
    """Segments of a stream that is fed in portions and decoded after each."""
    stream, segments, start = recognizer.create_stream(options), [], 0
    for length in [*splits, len(samples)]:
        stream.accept_waveform(RATE, samples[start : start + length])
        start += length
        recognizer.decode_streams([stream])
        assert stream.is_endpoint() == bool(stream.source._finished)
        segments += stream.take_segments()
        assert not stream.is_endpoint()
        assert not stream.get_result().is_final
    stream.input_finished()
    recognizer.decode_streams([stream])
    assert stream.get_result().is_final
    return segments + stream.take_segments()


@pytest.mark.parametrize("options", OPTIONS)
@settings(max_examples=6)
@given(data=st.data())
def test_every_word_of_a_recording_is_found_once(options, data):
    words = data.draw(st.lists(st.sampled_from("ABCD"), max_size=30))
    pauses = data.draw(st.lists(st.sampled_from([0.2, 0.2, 0.3, 1.2, 4.0]), min_size=len(words), max_size=len(words)))
    toy = Recognizer(ToyBundle(), ToyModel())
    samples, starts = say(words, pauses)
    transcript = toy.transcribe(samples, options=options)
    assert transcript.text.split() == words
    check_segments(transcript.segments, transcript.duration)
    found = [word for segment in transcript.segments for word in segment.words]
    assert [word.word for word in found] == words
    tones = [(start, start + 0.3) for start in starts]
    for word, (start, end) in zip(found, tones, strict=True):
        assert word.start <= end
        assert word.end >= start  # the word's time has something of its tone
        assert 0.9 < word.confidence <= 1
    peaks = [time for segment in transcript.segments for time in segment.times]
    assert all(start - 0.1 <= peak <= end + 0.1 for peak, (start, end) in zip(peaks, tones, strict=True))


def check_segments(segments, duration):
    assert [segment.segment for segment in segments] == list(range(len(segments)))
    assert all(segment.is_final and segment.text for segment in segments)
    edges = [edge for segment in segments for word in segment.words for edge in (word.start, word.end)]
    assert edges == sorted(edges)
    assert all(0 <= edge <= duration for edge in edges)
    peaks = [time for segment in segments for time in segment.times]
    assert peaks == sorted(peaks)
    for segment in segments:
        assert (segment.start, segment.end) == (segment.words[0].start, segment.words[-1].end)
        assert segment.nbest[0].tokens == segment.tokens


def test_segments_end_where_speakers_pause(toy):
    samples, starts = say("ABCDA", [0.3, 0.3, 1.5, 0.3, 3.0])
    segments = hear(toy, samples)
    assert [segment.text for segment in segments] == ["A B", "C D", "A"]
    assert [segment.times[0] for segment in segments] == pytest.approx([starts[0], starts[2], starts[4]], abs=0.3)


def test_a_long_utterance_is_cut_between_words(toy):
    # No rule but the third can fire: after 6 s, amid a tone.
    samples, starts = say("ABCD" * 8, [0.35] + [0.1] * 31, tone_s=0.5)
    assert any(start + 0.2 < 6.0 < start + 0.3 for start in starts)
    for options in OPTIONS[:4]:
        segments = hear(toy, samples, options=options)
        assert " ".join(segment.text for segment in segments).split() == list("ABCD" * 8)
        assert 3 <= len(segments) <= 7
        assert all(segment.end - segment.start <= 6.1 for segment in segments)


@settings(max_examples=8)
@given(st.lists(st.integers(0, 50_000), max_size=8), st.sampled_from(OPTIONS[:4]))
def test_portions_do_not_matter(splits, options):
    samples, _ = say("ABCDABCDAB", [0.3, 0.3, 1.5, 0.3, 3.0, 0.1, 0.1, 0.1, 0.1, 2.0])
    toy = Recognizer(ToyBundle(), ToyModel())
    assert hear(toy, samples, splits, options) == hear(toy, samples, (), options)


def num_frames_held(stream):
    """Encoder frames that a stream holds, as output or as features."""
    return sum(map(len, stream.source.utterance._outputs)) + stream.source._reception._windows._num_frames // 4


def test_minutes_in_flat_memory(toy):
    samples, _ = say("ABCD" * 15, [0.3, 1.0, 0.2, 0.7] * 15)
    for options in (OPTIONS[1], OPTIONS[-1]):
        stream = toy._stream(dataclasses.replace(options, search="ctc_prefix_beam"), options.chunk_size, None)
        texts, caches, held = [], 0, 0
        for _ in range(5):
            stream.accept_waveform(RATE, samples)
            toy.decode_streams([stream])
            texts += [segment.text for segment in stream.take_segments()]
            caches = max(
                caches, stream.source.caches.num_cached, stream.source.caches.offset if options.chunk_size else 0
            )
            held = max(held, num_frames_held(stream))
        assert caches <= 6 * 25 + 32  # an utterance, and the chunk in which it ended
        assert held <= 30 * 25 + 10 * 25
        stream.input_finished()
        toy.decode_streams([stream])
        texts += [segment.text for segment in stream.take_segments()]
        assert " ".join(texts).split() == list("ABCD" * 15 * 5)


@pytest.fixture
def short_windows(monkeypatch):
    """Recordings of more than four seconds are long ones."""
    monkeypatch.setattr("u2moe.runtime.source.LONGEST_WINDOW_S", 4.0)


def test_a_recording_that_fits_one_window_is_encoded_whole(toy):
    samples, _ = say("ABCDAB", [0.3, 0.2, 0.6, 0.2, 1.1, 0.3])
    transcript = toy.transcribe(samples, options=DecodingOptions(endpoint=EndpointConfig()))
    assert transcript.text == "A B C D A B"
    assert len(transcript.segments) == 1
    assert toy.model.session.durations == pytest.approx([len(samples) / RATE], abs=0.08)


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize("pause", [0.4, 0.9])
def test_full_context_ends_amid_pauses(toy, pause):
    """What is said after a pause, in a long recording, is encoded without what was said before."""
    pauses = [0.3, 0.2, 0.6, 0.2, 1.1, 0.3]
    samples, starts = say("ABCDAB", pauses)
    late = EndpointRule(min_utterance_length=20.0)
    endpoint = EndpointConfig(rule1=None, rule2=None, rule3=late, pause=pause)
    transcript = toy.transcribe(samples, options=DecodingOptions(endpoint=endpoint))
    assert transcript.text == "A B C D A B"
    check_segments(transcript.segments, transcript.duration)
    ends = [start - long / 2 for start, long in zip(starts, pauses, strict=True) if long > pause and start > 1]
    edges = [0.0, *ends, len(samples) / RATE]
    assert toy.model.session.durations == pytest.approx(np.diff(edges), abs=0.08)
    assert len(transcript.segments) == len(toy.model.session.durations) == {0.4: 3, 0.9: 2}[pause]


@pytest.mark.usefixtures("short_windows")
def test_without_pause_windows_are_full(toy):
    samples, _ = say("ABCDAB", [0.3, 0.2, 0.6, 0.2, 1.1, 0.3])
    transcript = toy.transcribe(samples, options=DecodingOptions(endpoint=EndpointConfig(pause=None)))
    assert transcript.text == "A B C D A B"
    assert toy.model.session.durations[0] == pytest.approx(4.0, abs=0.1)


@pytest.mark.usefixtures("short_windows")
def test_what_a_window_ends_amid_is_encoded_again(toy):
    """A word at the end of the window, in an utterance that began in its second half: heard once, and whole."""
    samples, starts = say("ABCD", [0.9, 2.5, 0.2, 0.2], tone_s=0.4)
    assert starts[1] + 0.1 < 4.0 < starts[1] + 0.3
    transcript = toy.transcribe(samples, options=DecodingOptions(endpoint=dataclasses.replace(RULES, pause=None)))
    assert [segment.text for segment in transcript.segments] == ["A", "B C D"]
    assert starts[1] <= transcript.segments[1].times[0] <= starts[1] + 0.4


@pytest.mark.usefixtures("short_windows")
def test_a_pause_in_which_somebody_speaks_quietly_is_none():
    """A loud speaker and one 50 dB below, whose words are longer than a pause: none of them is cut."""
    loud, _ = say("ABC", [0.3, 0.3, 0.3])
    quiet, _ = say("DADAD", [0.05] * 5, tone_s=0.7)
    samples = np.concatenate([loud[: -RATE // 2], 10 ** (-50 / 20) * quiet[: -RATE // 2], loud])
    toy = Recognizer(ToyBundle(), ToyModel(threshold=7.0))
    for pause in (0.4, None):
        toy.model.session.durations.clear()
        transcript = toy.transcribe(samples, options=DecodingOptions(endpoint=EndpointConfig(pause=pause)))
        assert transcript.text == "A B C D A D A D A B C"
        check_segments(transcript.segments, transcript.duration)


def test_a_long_recording_is_cut_at_pauses_alike_in_any_portions(toy):
    samples, _ = say("ABCD" * 20, [0.3, 0.7, 0.2, 3.0] * 20)
    options = DecodingOptions(search="ctc_prefix_beam", endpoint=EndpointConfig())
    expected = toy.transcribe(samples, options=options).segments
    assert " ".join(segment.text for segment in expected) == " ".join("ABCD" * 20)
    assert len(expected) == 41  # A, BC, DA, BC, ..., D
    for size in (1000, 77_777):
        stream = toy._stream(options, None, None)
        for start in range(0, len(samples), size):
            stream.accept_waveform(RATE, samples[start : start + size])
            toy.decode_streams([stream])
        stream.input_finished()
        toy.decode_streams([stream])
        assert stream.take_segments() == expected


def test_without_rules_nothing_ends(toy):
    samples, _ = say("AB", [0.3, 5.0])
    stream = toy.create_stream(dataclasses.replace(CHUNKED, endpoint=None))
    stream.accept_waveform(RATE, samples)
    toy.decode_streams([stream])
    assert not stream.is_endpoint()
    assert stream.take_segments() == []
    assert stream.get_result().text == "A B"


def test_many_streams_go_through_the_encoder_together(toy):
    sounds = [say("ABCD"[i % 4 :] + "ABCD", [0.2 + 0.1 * i] * (8 - i % 4))[0][: 50_000 + 3000 * i] for i in range(20)]
    expected = [hear(toy, samples) for samples in sounds]
    toy.model.session.batches.clear()
    assert hear_together(toy, sounds) == expected
    assert max(toy.model.session.batches) > 15
    toy.model.session.batches.clear()
    mixed = [(CHUNKED, dataclasses.replace(CHUNKED, chunk_size=8))[i % 2] for i in range(20)]
    hear_together(toy, sounds, mixed)
    assert 5 < max(toy.model.session.batches) <= 10
    toy.model.session.batches.clear()
    contexts = [(CHUNKED, dataclasses.replace(CHUNKED, num_left_chunks=-1))[i % 2] for i in range(20)]
    assert hear_together(toy, sounds, contexts) == expected  # the toy hears no context, but looks after its cache
    assert 5 < max(toy.model.session.batches) <= 10


def hear_together(recognizer, sounds, options=None, step=7000):
    """Segments of each of many streams, which begin one after the other."""
    options = options or [CHUNKED] * len(sounds)
    streams = [recognizer.create_stream(item) for item in options]
    segments = [[] for _ in sounds]
    for start in range(0, max(map(len, sounds)) + step * len(sounds), step):
        for number, (stream, samples) in enumerate(zip(streams, sounds, strict=True)):
            begin = start - step * (number % 5)
            if begin >= 0:
                stream.accept_waveform(RATE, samples[begin : begin + step])
        recognizer.decode_streams(streams)
        for stream, own in zip(streams, segments, strict=True):
            own.extend(stream.take_segments())
    for stream in streams:
        stream.input_finished()
    recognizer.decode_streams(streams)
    return [own + stream.take_segments() for stream, own in zip(streams, segments, strict=True)]


TINY = DecodingOptions(
    chunk_size=16, num_left_chunks=2,
    endpoint=EndpointConfig(rule1=None, rule2=None, rule3=EndpointRule(min_utterance_length=1.5)),
)  # fmt: skip


@pytest.fixture(scope="module")
def either(bundle, recognizer, tmp_path_factory):
    """A function from the precision to the recogniser of the tiny bundle."""
    quantized, _ = quantize_bundle(bundle.path, tmp_path_factory.mktemp("int8") / "bundle", RECIPES["int8"])
    return {"float32": recognizer, "int8": Recognizer(quantized, quantized.load())}.__getitem__


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("num_left_chunks", [2, 0, -1])
def test_a_batch_gives_what_one_by_one_gives(either, precision, sound, num_left_chunks):
    """Loud and quiet streams: scales of activations that they shared would show."""
    recognizer = either(precision)
    options = dataclasses.replace(TINY, num_left_chunks=num_left_chunks)
    sounds = [np.roll(sound, 5000 * i)[: 30_000 + 4567 * i] * (0.2 + 0.2 * i) for i in range(7)]
    alone = [hear(recognizer, samples, options=options) for samples in sounds]
    together = hear_together(recognizer, sounds, [options] * 7)
    assert [[s.tokens for s in segments] for segments in together] == [[s.tokens for s in ss] for ss in alone]
    for one, other in zip(itertools.chain(*alone), itertools.chain(*together), strict=True):
        assert one.times == other.times
        # Matrix products of other heights may round the last bit otherwise.
        assert one.score == pytest.approx(other.score, abs=1e-3)


@pytest.mark.parametrize("precision", ["float32", "int8"])
@settings(max_examples=8)
@given(st.data())
def test_batches_may_change_from_chunk_to_chunk(either, precision, sound, data):
    """Streams come and go, pause and change places: caches must stay those of their own stream."""
    recognizer = either(precision)
    sounds = [np.roll(sound, 5000 * i)[: 30_000 + 4567 * i] for i in range(5)]
    alone = [hear(recognizer, samples, options=TINY) for samples in sounds]
    streams = [recognizer.create_stream(TINY) for _ in sounds]
    segments = [[] for _ in sounds]
    parts = [list(np.array_split(samples, 5)) for samples in sounds]
    while any(parts):
        chosen = data.draw(st.permutations([i for i in range(5) if parts[i]]).flatmap(lambda p: st.sampled_from(
            [p[:n] for n in range(1, len(p) + 1)])))  # fmt: skip
        for i in chosen:
            streams[i].accept_waveform(RATE, parts[i].pop(0))
            if not parts[i]:
                streams[i].input_finished()
        recognizer.decode_streams([streams[i] for i in chosen])
        for i in chosen:
            segments[i] += streams[i].take_segments()
    assert [[s.tokens for s in own] for own in segments] == [[s.tokens for s in own] for own in alone]
    for one, other in zip(itertools.chain(*alone), itertools.chain(*segments), strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-3)


def test_segments_are_rescored(recognizer, sound):
    segments = hear(recognizer, np.tile(sound, 3), options=TINY)
    assert len(segments) > 3
    check_segments(segments, 12.0)
    assert all(segment.nbest[0].attention_score is not None for segment in segments)
    assert all(0 <= word.confidence <= 1 for segment in segments for word in segment.words)


def test_hotwords_of_streams_and_recognisers(toy):
    samples, _ = say("AB", [0.3, 0.3])
    named = Recognizer(toy.bundle, toy.model, hotwords=["a b"])
    stream, plain = named.create_stream(CHUNKED), toy.create_stream(CHUNKED)
    other = named.create_stream(CHUNKED, hotwords=[("B", 2.0)])
    for each in (stream, plain, other):
        each.accept_waveform(RATE, samples)
        each.input_finished()
    named.decode_streams([stream, plain, other])
    scores = [each.get_result().score for each in (stream, plain, other)]
    # Other prefixes are followed with hotwords, so that sums over alignments are not quite the same.
    assert scores[0] - scores[1] == pytest.approx(3.0, abs=0.01)
    assert scores[2] - scores[1] == pytest.approx(2.0, abs=0.01)
    assert toy.transcribe(samples, hotwords={"B": 2.0}) == toy.transcribe(samples, hotwords=[("B", 2.0)])
    assert toy.transcribe(samples, hotwords=["A"]).segments[0].score - scores[1] == pytest.approx(1.5, abs=0.1)
    with pytest.raises(ValueError, match="hotword 'Z': the vocabulary has no 'Z'"):
        toy.create_stream(hotwords=["Z"])
    with pytest.raises(ValueError, match="hotwords need a prefix beam search"):
        toy.create_stream(DecodingOptions(search="ctc_greedy"), hotwords=["A"])


def test_one_thread_feeds_while_another_decodes(toy):
    samples, _ = say("ABCD" * 5, [0.3] * 20)
    stream = toy.create_stream(CHUNKED)

    def feed():
        for start in range(0, len(samples), 999):
            stream.accept_waveform(RATE, samples[start : start + 999])
        stream.input_finished()

    feeder, segments = threading.Thread(target=feed), []
    feeder.start()
    while not stream.get_result().is_final:
        toy.decode_streams([stream])
        segments += stream.take_segments()
    feeder.join()
    assert segments == hear(toy, samples)


def test_two_threads_feed_and_nothing_is_torn(toy):
    stream = toy.create_stream(CHUNKED)
    feeders = [
        threading.Thread(target=lambda: [stream.accept_waveform(RATE, np.zeros(160, np.float32)) for _ in range(300)])
        for _ in range(2)
    ]
    for feeder in feeders:
        feeder.start()
    for feeder in feeders:
        feeder.join()
    stream.input_finished()
    toy.decode_streams([stream])
    assert stream.duration == 6.0
    assert stream.source.num_frames == ((600 * 160 - 400) // 160 + 1 - 7) // 4 + 1


def test_many_threads_share_a_recogniser(recognizer, sound):
    sounds = [np.roll(sound, 4000 * i) for i in range(4)]
    expected = [recognizer.transcribe(samples, options=TINY) for samples in sounds]
    found = [None] * 4
    threads = [
        threading.Thread(target=lambda i=i: found.__setitem__(i, recognizer.transcribe(sounds[i], options=TINY)))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_a_second_thread_may_not_decode_the_same_stream(toy):
    stream = toy.create_stream(CHUNKED)
    with stream.source.claim(), pytest.raises(StreamError, match="decoded by another thread"):
        toy.decode_streams([stream])
    toy.decode_streams([stream])


def test_after_a_failure_a_stream_must_be_reset(toy):
    samples, _ = say("AB", [0.3, 0.3])
    stream, other = toy.create_stream(CHUNKED), toy.create_stream(CHUNKED)
    for each in (stream, other):
        each.accept_waveform(RATE, samples)
    toy.model.session.fails = True
    with pytest.raises(ProviderError, match="gone"):
        toy.decode_streams([stream])
    toy.model.session.fails = False
    for use in (
        stream.input_finished,
        lambda: stream.accept_waveform(RATE, samples),
        lambda: toy.decode_streams([stream]),
    ):
        with pytest.raises(StreamError, match="has failed"):
            use()
    toy.decode_streams([other])
    assert other.get_result().text == "A B"
    stream.reset()
    stream.accept_waveform(RATE, samples)
    toy.decode_streams([stream])
    assert stream.get_result().text == "A B"


def test_the_frame_of_an_endpoint_does_not_depend_on_chunks(toy):
    samples, _ = say("AB", [0.3, 2.0])
    ends = set()
    for chunk_size in (1, 3, 16, 40):
        found = hear(toy, samples, options=dataclasses.replace(CHUNKED, chunk_size=chunk_size))
        ends.add(tuple((segment.text, segment.start, segment.end) for segment in found))
    assert len(ends) == 1


def test_utterances_that_end_together_are_rescored_together(recognizer, sound, monkeypatch):
    """One call for those of like length, and what each would be given alone."""
    options = dataclasses.replace(TINY, endpoint=None)
    sounds = [sound[:40_000], sound[::-1][:40_000], sound[:15_000], 0.5 * sound[:41_000]]
    alone = [hear_together(recognizer, [samples], [options])[0] for samples in sounds]
    calls = []
    run = recognizer.model._decoder.run
    monkeypatch.setattr(recognizer.model._decoder, "run", lambda feeds: calls.append(len(feeds["hyps"])) or run(feeds))
    assert hear_together(recognizer, sounds, [options] * 4) == alone
    assert len(calls) < sum(calls) == 4
