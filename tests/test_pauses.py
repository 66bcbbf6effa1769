import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2moe.benchmarks.studies.word_times import loud_part
from u2moe.runtime import DecodingOptions, Recognizer
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.decoding.pauses import end_at_pauses, find_pauses, first_pause, token_spans
from u2moe.runtime.result import Alternative, Result, moved
from u2moe.runtime.text.word_errors import matches

LOUD, SOFT = 18.0, 3.0


def levels_of(*parts):
    """Return the loudness of stretches of (level, frames), with small changes from frame to frame."""
    flat = np.concatenate([np.full(frames, level) for level, frames in parts])
    return (flat + 0.3 * np.random.default_rng(0).standard_normal(len(flat))).astype(np.float32)


def test_pauses_are_found_and_far_ones_stretch_no_word():
    levels = levels_of((SOFT, 30), (LOUD, 50), (SOFT, 5), (LOUD, 20), (SOFT, 9), (LOUD, 40), (SOFT, 25))
    assert np.allclose(find_pauses(levels, 0.01), [(0.0, 0.3), (1.05, 1.14), (1.54, 1.79)])
    noisy = levels_of((12.0, 30), (LOUD, 50), (12.0, 30))
    assert np.allclose(find_pauses(noisy, 0.01), [(0.0, 0.3), (0.8, 1.1)])
    edited = levels_of((-15.9, 60), (4.0, 20), (LOUD, 50), (4.0, 20))
    assert np.allclose(find_pauses(edited, 0.01), [(0.0, 0.8), (1.3, 1.5)])
    assert find_pauses(np.zeros(0, np.float32), 0.01) == []
    assert find_pauses(np.full(50, LOUD, np.float32), 0.01) == []
    assert end_at_pauses([(1.5, 2.5)], [(2.0, 2.0)], [(0.0, 0.4), (3.5, 4.0)]) == [(1.5, 2.5)]


@pytest.mark.parametrize(("parts", "after_s", "expected"), [
    ([(LOUD, 50), (SOFT, 30), (LOUD, 50), (SOFT, 60), (LOUD, 50)], 0.0, (1.3, 1.9)),  # the first is too short
    ([(SOFT, 60), (LOUD, 50), (SOFT, 50), (LOUD, 50)], 0.0, (1.1, 1.6)),  # the first is at the beginning
    ([(LOUD, 50), (SOFT, 60), (LOUD, 50), (SOFT, 70)], 0.0, (0.5, 1.1)),
    ([(LOUD, 50), (SOFT, 60), (LOUD, 50), (SOFT, 70)], 0.85, (1.6, 2.3)),
    ([(LOUD, 50), (SOFT, 49), (LOUD, 50)], 0.0, None),
    ([(LOUD, 300)], 0.0, None),
])  # fmt: skip
def test_the_first_pause_that_is_long_enough(parts, after_s, expected):
    assert first_pause(levels_of(*parts), 0.01, 0.5, after_s) == (expected and pytest.approx(expected))


@pytest.mark.parametrize(("pauses", "expected"), [
    ([], [(0.0, 0.75), (0.75, 1.5)]),
    ([(0.0, 0.2), (0.6, 1.0), (1.4, 1.6)], [(0.2, 0.6), (1.0, 1.4)]),
    ([(0.55, 0.64), (0.7, 0.9)], [(0.0, 0.7), (0.9, 1.5)]),  # the longer one
    ([(0.45, 0.7)], [(0.0, 0.45), (0.7, 1.5)]),  # the first word peaks after its end
    ([(0.7, 1.1)], [(0.0, 0.7), (1.1, 1.5)]),  # the second one before its start
    ([(0.1, 0.3)], [(0.3, 0.75), (0.75, 1.5)]),
    ([(0.0, 1.5)], [(0.0, 0.75), (0.75, 1.5)]),  # silence only
])  # fmt: skip
def test_words_end_at_pauses(pauses, expected):
    assert np.allclose(end_at_pauses([(0.0, 0.75), (0.75, 1.5)], [(0.3, 0.5), (1.0, 1.2)], pauses), expected)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8, unique=True).map(sorted), st.integers(0, 1000))
def test_words_stay_in_order_and_apart(peaks, seed):
    edges = [(a + b) / 2 for a, b in itertools.pairwise(peaks)]
    words = list(zip([0.0, *edges], [*edges, 61.0], strict=True))
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(62), 8, replace=False)).reshape(-1, 2).tolist()
    found = end_at_pauses(words, [(peak, peak) for peak in peaks], [tuple(cut) for cut in cuts])
    flat = [edge for word in found for edge in word]
    assert flat == sorted(flat)
    assert all(start < end for start, end in found)


def joined_words(samples, rate=16_000):
    """Return the times of words that were joined with exact silence between them."""
    zero = np.concatenate(([False], samples == 0, [False]))
    gaps = [(a, b) for a, b in np.flatnonzero(np.diff(zero)).reshape(-1, 2).tolist() if b - a >= 0.1 * rate]
    begins, ends = [0, *(b for _, b in gaps)], [*(a for a, _ in gaps), len(samples)]
    loud = [loud_part(samples[begin:end]) for begin, end in zip(begins, ends, strict=True)]
    return [(begin / rate + start, begin / rate + end) for begin, (start, end) in zip(begins, loud, strict=True)]


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_times_are_those_of_the_sound(chunk_size):
    """The clip has spoken digits, joined at known times. Most words begin and end within 80 ms of these."""
    clip = DEMO_FOLDER / "clips" / "phone_number.flac"
    text = next(item.transcript for item in read_recordings(clip.with_name("transcripts.txt")) if item.path == clip)
    spoken = joined_words(read_audio(clip, 16_000))
    assert len(spoken) == len(text.split()) >= 5
    recognizer = Recognizer.from_pretrained(options=DecodingOptions(chunk_size=chunk_size))
    found = words_of(recognizer.transcribe(clip))
    pairs = matches(text.split(), [word.word for word in found])
    # A wrong word shifts the times of its neighbours, so judge only words with correct neighbours.
    known = {(-1, -1), *pairs, (len(spoken), len(found))}
    judged = [(place, i) for place, i in pairs if {(place - 1, i - 1), (place + 1, i + 1)} <= known]
    assert len(judged) >= len(spoken) / 2
    errors = np.abs([np.subtract((found[i].start, found[i].end), spoken[place]) for place, i in judged])
    assert np.median(errors) <= 0.04
    assert np.percentile(errors, 90) <= 0.08


def test_a_recording_is_recognised_alike_beside_others():
    """The recording has clips of three people with pauses. Encoded together, the demo model recognises other words."""
    rate, random = 16_000, np.random.default_rng(0)
    recognizer = Recognizer.from_pretrained()
    clips = [read_audio(path, rate) for path in sorted(DEMO_FOLDER.glob("clips/*.flac"))]
    alone = [words_of(recognizer.transcribe(samples)) for samples in clips]
    order = [number for _ in range(3) for number in random.permutation(len(clips))]
    quiet = (1e-4 * random.standard_normal(round(0.7 * rate))).astype(np.float32)
    together = np.concatenate([part for number in order for part in (clips[number], quiet)])
    expected = [word for number in order for word in alone[number]]
    found = words_of(recognizer.transcribe(together))
    pairs = matches([word.word for word in expected], [word.word for word in found])
    differences = [abs(expected[place].confidence - found[i].confidence) for place, i in pairs]
    # The mean difference of confidences, where a missing word counts as 1: edges of clips include noise
    assert (sum(differences) + len(expected) - len(pairs)) / len(expected) <= 0.1


def words_of(transcript):
    return [word for segment in transcript.segments for word in segment.words]


def test_spans_equal_wenet(golden):
    for utterance, mode, results in golden.cases():
        num_frames = len(golden.arrays[f"{utterance}/{mode}/ctc_logprobs"])
        spans = token_spans(results["ctc_peaks"], 0.04, num_frames * 0.04)
        np.testing.assert_allclose(spans, results["peak_timestamps"], atol=1e-9)


def test_a_text_without_times_of_words_moves_as_a_whole():
    scores = {"score": 0.0, "ctc_score": None, "attention_score": None}
    nbest = [Alternative(text="a", tokens=[1], times=[time], **scores) for time in (0.75, 1.0)]
    found = moved(Result(text="here", is_final=True, start=0.5, end=2.0, times=[0.75], nbest=nbest), 60.0, 3)
    assert (found.segment, found.start, found.end, found.times) == (3, 60.5, 62.0, [60.75])
    assert [each.times for each in found.nbest] == [[60.75], [61.0]]
    silent = moved(Result(text="", is_final=True), 60.0, 3)
    assert (silent.start, silent.end) == (0.0, 0.0)
