"""Committed words: no later partial result changes them, but the second pass may."""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from feeding import CHUNKED, RATE, TINY, partials
from hypothesis import given, settings
from hypothesis import strategies as st
from language_models import random_arpa
from searches import HOTWORDS, SYMBOLS, VOCABULARY, log_softmax
from tones import say, toy_recognizer

from u2moe.runtime import DecodingOptions, Grammar, LanguageModel, LanguageModelOptions, TextFormat
from u2moe.runtime.decoding.context import ContextGraph, parse_hotwords
from u2moe.runtime.decoding.ctc import GreedySearch, PrefixBeamSearch
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.text.vocabulary import TextConfig, Vocabulary
from u2moe.runtime.text.word_errors import num_revised

WORDS = ("A", "B", "CA", "CAB", "AB", "中", "BAC", "D")
CONTEXT = ContextGraph(parse_hotwords(HOTWORDS), VOCABULARY)
MODELS = ((WORDS, 3, {}), (WORDS, 2, {"positive_backoffs": True}), (("▁A", "A", "▁B", "B", "C", "中"), 3, {}))


@pytest.fixture(scope="module")
def fusions(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("models"), []
    for number, (words, order, changes) in enumerate(MODELS):
        path = folder / f"{number}.arpa"
        path.write_text(random_arpa(number, words, order, **changes), encoding="utf-8")
        options = LanguageModelOptions(model=LanguageModel.open(path), weight=0.5, word_bonus=0.5 - number)
        made.append(Fusion(options, VOCABULARY))
    return [*made, None, None]


def random_speech(random):
    """Draw log-probabilities [frames, symbols]: blanks, and frames in which one to three tokens compete."""
    num = random.integers(1, 120)
    scores = random.normal(0, random.choice([0.3, 1, 2]), (num, len(SYMBOLS)))
    scores[:, 0] += random.choice([2, 4, 8, 12])
    for frame in np.flatnonzero(random.random(num) < 0.3):
        scores[frame, random.integers(1, len(SYMBOLS), random.integers(1, 4))] += random.choice([4, 6, 8, 10, 12])
    return log_softmax(scores.round(1))


def check_stream(seed, fusions):
    """Search random speech; after each chunk, check the tokens committed before. Return their numbers."""
    random = np.random.default_rng(seed)
    frames, context = random_speech(random), CONTEXT if random.random() < 0.3 else None
    fusion = fusions[random.integers(len(fusions))]
    search = PrefixBeamSearch(int(random.integers(1, 12)), 0, context, fusion, blank_penalty=seed % 3 / 2)
    if seed % 10 == 9:
        search = GreedySearch(0)
    committed, peak, place = [], 0, 0
    while place <= len(frames):
        search.advance(frames[place : place + 5])
        place += 5
        if place > len(frames):
            search.finish()
        best = search.best().tokens
        assert best[: len(committed)] == committed
        assert context or search.hypotheses(1)[0].tokens == best
        assert peak <= search.next_peak() <= search.num_frames
        tokens, ends = search.settled(VOCABULARY.word_starts)
        words = VOCABULARY.complete_words(tokens, ends=ends)
        settled = tokens[: words[-1].end] if words else []
        search.commit(settled)
        assert search.next_peak() >= peak
        peak, committed = search.next_peak(), committed + settled
        # The best hypothesis begins with the committed words: none is part of a word.
        texts = [word.text for word in VOCABULARY.words(committed)]
        assert [word.text for word in VOCABULARY.words(best)][: len(texts)] == texts
    return len(committed), len(best)


def test_words_are_complete_when_the_next_begins_and_beaten_hypotheses_hold_nothing_back(fusions):
    # In the last seeds, a hypothesis returns that was behind another only in blanks.
    seeds = (*range(60), 764, 1540, 1576, 1834)
    committed, recognised = np.array([check_stream(seed, fusions) for seed in seeds]).sum(axis=0)
    assert committed > recognised / 3
    vocabulary = Vocabulary(["▁TEN", "▁DOG", "S", "▁", "中"], TextConfig(tokenizer="bpe"))
    for tokens, ends, expected in [
        ([0, 1, 4], False, ["TEN", "DOG", "中"]), ([0, 1], False, ["TEN"]), ([0, 1], True, ["TEN", "DOG"]),
        ([1, 2, 3], False, ["DOGS"]), ([3], True, []),
    ]:  # fmt: skip
        assert [word.text for word in vocabulary.complete_words(tokens, ends=ends)] == expected
    # Variants of the first words stay in the beam, so the hypotheses have no token in common
    scores = np.full((60, len(SYMBOLS)), -9.0)
    scores[:, 0] = 0.0
    scores[4::8, 2:5] = np.where(np.arange(7)[:, None] % 2, [4.0, 1.0, 1.0], [1.0, 4.0, 1.0])
    search = PrefixBeamSearch(10, 0)
    search.advance(log_softmax(scores))
    hypotheses = [each.tokens for each in search.hypotheses()]
    assert len({tuple(tokens[:1]) for tokens in hypotheses}) > 1
    tokens, _ = search.settled(VOCABULARY.word_starts)
    assert hypotheses[0][: len(tokens)] == tokens
    assert len(tokens) >= 4


@pytest.mark.endurance
def test_no_frame_changes_what_is_committed_in_a_thousand_streams(fusions):
    for seed in range(100, 2100):
        check_stream(seed, fusions)


TONES, _ = say("ABCDABCDABBA", [0.3, 0.3, 1.5, 0.3, 3.0, 0.1, 0.1, 0.1, 0.1, 2.0, 0.3, 0.3])
CASES = [CHUNKED, TINY, dataclasses.replace(CHUNKED, chunk_size=5), dataclasses.replace(CHUNKED, search="ctc_greedy"),
         dataclasses.replace(CHUNKED, text_format=TextFormat()),
         dataclasses.replace(CHUNKED, grammar=Grammar(lines=("a b", "c", "[unk]")))]  # fmt: skip


@functools.cache
def in_steps(options):
    return partials(toy_recognizer(), TONES, [640] * (len(TONES) // 640), options)


@pytest.mark.parametrize("options", CASES)
@settings(max_examples=2)
@given(st.lists(st.integers(0, 50_000), max_size=8), st.booleans())
def test_partial_results_say_what_is_committed_in_any_split_batch_and_thread(options, splits, is_alone):
    toy, (expected, finals) = toy_recognizer(), in_steps(options)
    for number, final in enumerate(finals):
        words, end, text = 0, 0.0, ""
        for found in (found for (segment, _), found in expected.items() if segment == number):
            assert found.text.startswith(found.committed)
            assert found.committed.startswith(text)
            assert found.num_committed == len(found.committed.split()) >= words
            assert found.committed_end >= end
            words, end, text = found.num_committed, found.committed_end, found.committed
        assert (final.committed, final.num_committed, final.revised) == (final.text, len(final.words), 0)
    assert any(found.num_committed for found in expected.values())
    others = [] if is_alone else [toy.create_stream(options) for _ in range(3)]
    with ThreadPoolExecutor(1) as thread:
        seen, own = thread.submit(partials, toy, TONES, splits, options, others).result()
    assert own == finals
    assert seen.items() <= expected.items()


def test_a_cut_takes_words_to_the_next_segment_and_full_context_commits_at_the_end(toy):
    """Rule 3 cuts before the last words. They were committed, but the cut does not count as a revision."""
    samples, _ = say("ABCD" * 8, [0.35] + [0.1] * 31, tone_s=0.5)
    seen, finals = partials(toy, samples, [1600] * (len(samples) // 1600), CHUNKED)
    most = {segment: found.num_committed for (segment, _), found in seen.items()}
    assert any(most.get(number, 0) > len(final.words) for number, final in enumerate(finals))
    assert [final.revised for final in finals] == [0] * len(finals)
    assert " ".join(final.text for final in finals).split() == list("ABCD" * 8)
    assert all(final.end - final.start <= 6.1 for final in finals)
    for final in toy.transcribe(TONES, options=dataclasses.replace(CHUNKED, chunk_size=None)).segments:
        assert final.num_committed == len(final.words) > 0


@pytest.mark.parametrize(("committed", "final", "expected"), [
    ("", "A B", 0), ("A B", "A B C", 0), ("A B", "A C B", 1), ("A B", "A", 1), ("A B C", "X B C D", 1),
    ("A B C D", "", 4), ("A B C D", "B C D E", 1),
])  # fmt: skip
def test_revised_counts_changed_words(committed, final, expected):
    assert num_revised(committed.split(), final.split()) == expected


@pytest.mark.parametrize("search", ["attention_rescoring", "attention"])
def test_the_final_result_says_what_the_second_pass_revises(recognizer, sound, search):
    stream = recognizer.create_stream(DecodingOptions(chunk_size=16, search=search, ctc_weight=0.0, beam_size=4))
    stream.accept_waveform(RATE, sound)
    recognizer.decode_streams([stream])
    partial = stream.get_result()
    assert partial.num_committed
    assert partial.revised == 0
    stream.input_finished()
    recognizer.decode_streams([stream])
    final = stream.get_result()
    committed = recognizer.vocabulary.words(stream.state.utterance._committed)
    assert len(committed) >= partial.num_committed
    words = [word.text for word in recognizer.vocabulary.words(final.tokens)]
    assert final.revised == num_revised([word.text for word in committed], words) > 0
    assert (final.committed, final.num_committed) == (final.text, len(words))
