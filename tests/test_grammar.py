"""Grammars: allowed texts, compared with brute force over phrases; phrases as events; and errors."""

import dataclasses
import functools
import itertools
import json

import numpy as np
import pytest
from feeding import CHUNKED, partials
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import log_softmax
from tones import say

from u2moe.runtime import DecodingOptions, EndpointConfig, EndpointRule, Grammar, GrammarError, Recognizer, cli
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.decoding.ctc import Hypothesis, ctc_prefix_beam_search
from u2moe.runtime.decoding.phrases import REST_COST, REST_PENALTY, PhraseGraph
from u2moe.runtime.decoding.utterance import Utterance
from u2moe.runtime.text.vocabulary import TextConfig, Vocabulary

SYMBOLS = ["<blank>", "▁A", "A", "▁B", "B", "▁", "中", "<sos/eos>"]
VOCABULARY = Vocabulary(SYMBOLS, TextConfig(tokenizer="bpe"))
REST = len(SYMBOLS)
GRAMMARS = {
    ("a",): {"A"}, ("a b", "a"): {"A B", "A"}, ("ab (a | b)", "[unk]"): {"AB A", "AB B"},
    ("<x> b", "<x> = a | [b] aa"): {"A B", "AA B", "B AA B"}, ("中 [a]", "[unk]"): {"中", "中 A"},
    ("b", "ba b", "[unk]"): {"B", "BA B"},
}  # fmt: skip
"""Grammars, and the phrases that they allow."""


def is_sequence(words, allowed):
    """Return whether words are a sequence of phrases."""
    return not words or any(words[: len(one)] == one and is_sequence(words[len(one) :], allowed) for one in allowed)


def is_allowed(tokens, lines):
    allowed = [tuple(phrase.split()) for phrase in GRAMMARS[lines]]
    written = [symbol.replace("▁", " ").replace("中", " 中 ") for symbol in SYMBOLS]
    text = "".join([*written, " | "][token] for token in tokens)
    after = [other for one, other in itertools.pairwise(tokens) if one == REST]
    is_apart = all(other != REST and SYMBOLS[other][0] in "▁中" for other in after)  # from the rest before
    return is_apart and all(is_sequence(tuple(part.split()), allowed) for part in text.split("|"))


@functools.cache
def sequences_of(lines):
    """Return all allowed sequences of at most four tokens."""
    known = [*range(1, len(SYMBOLS) - 1), *[REST] * ("[unk]" in lines)]
    return [each for size in range(5) for each in itertools.product(known, repeat=size) if is_allowed(each, lines)]


def score_of(tokens, log_probs):
    """Return the log-probability of all alignments of tokens, by CTC's recursion over frames."""
    blank, last = np.zeros(len(tokens) + 1), np.zeros(len(tokens) + 1)
    blank[0] = 1.0
    for row in np.exp(log_probs.astype(float)):
        before, was = blank.copy(), last.copy()
        for place in range(len(tokens) + 1):
            blank[place] = (before[place] + was[place]) * row[0]
            if not place:
                continue
            token, previous = tokens[place - 1], tokens[place - 2] if place > 1 else None
            if token == REST:
                is_apart = previous is None or SYMBOLS[previous][-1] in "▁中"
                enters = (before[place - 1] + was[place - 1]) * (row[1:] if is_apart else row[[1, 3, 5, 6]]).max()
                stays = (before[place] + was[place]) * row[1:].max()
                last[place] = (stays + enters * np.exp(-REST_COST)) * np.exp(-REST_PENALTY)
            else:
                reached = before[place - 1] + (was[place - 1] if token != previous else 0.0)
                last[place] = (was[place] + reached) * row[token]
    return blank[-1] + last[-1]


@pytest.mark.parametrize("lines", GRAMMARS)
@settings(max_examples=8)
@given(st.integers(0, 10_000))
def test_the_search_scores_what_brute_force_does(lines, seed):
    frames = log_softmax(np.random.default_rng(seed).normal(0, 2, (4, len(SYMBOLS))))
    graph = PhraseGraph(Grammar(lines=lines), VOCABULARY)
    found = {tuple(each.tokens): each.score for each in ctc_prefix_beam_search(frames, 5000, grammar=graph)}
    scores = {each: score_of(each, frames) for each in sequences_of(lines)}
    assert found == pytest.approx({each: np.log(score) for each, score in scores.items() if score > 0}, abs=1e-5)
    for tokens in found:
        bounds = graph.phrases(tokens)
        texts = {VOCABULARY.text(tokens[begin:end]) for begin, end in bounds}
        assert {text.replace(" ", "") for text in texts} <= {each.replace(" ", "") for each in GRAMMARS[lines]}
        assert sum(end - begin for begin, end in bounds) + sum(token in (5, REST) for token in tokens) >= len(tokens)


TONES, _ = say("ABDCABAB", [0.3, 0.1, 0.4, 0.4, 0.8, 0.1, 2.5, 0.1], tone_s=0.16)
PHRASES = ("a b", "c", "[unk]")


@pytest.mark.parametrize("chunk_size", [16, 4, None])
def test_the_rest_of_speech_is_one_word(toy, chunk_size):
    options = dataclasses.replace(CHUNKED, chunk_size=chunk_size)
    found = toy.transcribe(TONES, options=options, grammar=PHRASES).segments
    assert [each.text for each in found] == ["A B [unk] C", "A B", "A B"]
    assert [[phrase.phrase for phrase in each.phrases] for each in found] == [["A B", "C"], ["A B"], ["A B"]]
    for each in found:
        times = [(word.start, word.end) for word in each.words]
        assert (each.phrases[0].start, each.phrases[0].end) == (times[0][0], times[1][1])
        assert all(0 < phrase.confidence <= 1 for phrase in each.phrases)
    assert [each.text for each in toy.transcribe(TONES, options=options, grammar=["c"]).segments] == ["C"]


def test_phrases_are_certain_before_the_end_and_stay(toy):
    options = dataclasses.replace(CHUNKED, chunk_size=4, grammar=Grammar(lines=PHRASES))
    partial, finals = partials(toy, TONES, [640] * (len(TONES) // 640), options)
    most = [0] * len(finals)
    for (segment, _), found in partial.items():
        ours, all_of = ([each.phrase for each in result.phrases] for result in (found, finals[segment]))
        assert ours == all_of[: len(ours)]
        most[segment] = max(most[segment], len(ours))
    assert most[:2] == [2, 1]


def test_each_phrase_is_one_event(tmp_path, capsys):
    file = tmp_path / "phrases.txt"
    digits = "<digit> = (one | two | three | five | six | seven)\n<digit> <digit> <digit>"
    file.write_text(f"# of the clips\nget back to (work | town)\n\n[unk]\n{digits}", encoding="utf-8")
    clips = [str(clip) for clip in sorted(DEMO_FOLDER.glob("clips/*.flac"))]
    assert cli.main(["transcribe", "--stream", "-f", "events", "--grammar", str(file), *clips]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    said = [event for event in events if event["type"] == "phrase"]
    assert [(event["phrase"], event["segment"]) for event in said] == [
        ("GET BACK TO WORK", 0), ("SEVEN THREE FIVE", 0), ("TWO ONE SIX", 0)]  # fmt: skip
    assert [event["phrase"] for event in said] == [
        phrase["phrase"] for event in events if event["type"] == "segment" for phrase in event["phrases"]]  # fmt: skip
    assert cli.main(["transcribe", "--stream", "--grammar", str(file), *clips]) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "confidence" in line] == [
        "{phrase} ({start:.2f} to {end:.2f} s, confidence {confidence:.2f})".format(**each) for each in said
    ]


DOUBLED = [f"<{'a' * n}> = <{'a' * (n + 1)}> (a | b) <{'a' * (n + 1)}>" for n in range(1, 20)]
TWICE = [f"<{'a' * n}> = <{'a' * (n + 1)}> | <{'a' * (n + 1)}>" for n in range(1, 60)]
OPTIONAL = [f"<{'a' * n}> = [<{'a' * (n + 1)}>] [<{'a' * (n + 1)}>]" for n in range(1, 20)]
BAD = {
    "a list of phrases, got 'a'": "a",
    "found no phrase, expected at least one": ["[unk]"],
    "phrases of at most 20000 characters, got 3": [3],
    "phrase '': found nothing, expected words": [""],
    "phrase '[a]': can be empty, expected at least one word": ["[a]"],
    "phrase 'a | ': found nothing, expected words": ["a | "],
    "phrase '(a': found the end, expected ')'": ["(a"],
    "phrase 'a)': found ')', expected words": ["a)"],
    "phrase 'a <b': found '<', expected words, (), [], | or <slot>": ["a <b"],
    "phrase 'a [unk]': found '[unk]', expected [unk] on a line of its own": ["a [unk]"],
    "phrase 'a <x>': found slot <x>, expected none: the grammar defines none": ["a <x>"],
    "phrase 'a <x>': found slot <x>, expected one of <y>, <z>": ["a <x>", "<y> = a", "<z> = b"],
    "phrase '<x>': slot <x> contains itself": ["<x>", "<x> = a <y>", "<y> = b <x>"],
    "found more than 100 nested brackets or slots": ["(" * 101 + "a" + ")" * 101],
    "slot <x>: found two definitions, expected one": ["<x>", "<x> = a", "<x> = b"],
    "phrase 'a z': the vocabulary has no 'z'": ["b", "a z"],
    "found 262144 characters, 681583 steps, expected fewer": ["<a>", *DOUBLED, f"<{'a' * 20}> = a"],
    "found 3 characters, 2097153 steps, expected fewer": ["<a>", *TWICE, f"<{'a' * 60}> = a"],
    "found 4083 characters, 2098171 steps, expected fewer": ["<a>", *OPTIONAL, f"<{'a' * 20}> = a"],
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_grammars_are_refused_by_name(toy, message):
    with pytest.raises(GrammarError) as refusal:
        toy.transcribe(TONES, grammar=BAD[message])
    assert message in str(refusal.value)


def test_a_grammar_stands_alone(toy):
    greedy = {"options": DecodingOptions(search="ctc_greedy")}
    for chosen, message in (({"hotwords": ["a"]}, "replaces hotwords"), (greedy, "needs a prefix beam")):
        with pytest.raises(ValueError, match=message):
            toy.transcribe(TONES, grammar=PHRASES, **chosen)


def test_second_passes_score_what_was_heard_for_the_rest(recognizer, sound):
    """All n-best hypotheses are in the grammar. In place of the rest, the decoder reads the best tokens."""
    letters = [symbol for symbol in recognizer.vocabulary.symbols if symbol.strip("▁").isalpha()][:6]
    grammar = [symbol.replace("▁", " ") for symbol in letters]
    found = recognizer.transcribe(sound, grammar=[*grammar, "[unk]"]).segments
    assert found
    for each in found:
        for alternative in each.nbest:
            graph = PhraseGraph(Grammar(lines=(*grammar, "[unk]")), recognizer.vocabulary)
            state = graph.start
            for token in alternative.tokens:
                state = graph.advance(state, token)
            assert state.accepts
            assert alternative.attention_score < 0


def test_other_words_cost_their_beginning_and_thousands_of_phrases_share_theirs():
    utterance = object.__new__(Utterance)
    utterance.grammar = PhraseGraph(Grammar(lines=("a b", "[unk]")), VOCABULARY)
    utterance._loudest = [1, ~1, 3, 3, 2]  # token 1, blank, token 3, and the next token
    heard, begins = utterance.heard(Hypothesis(tokens=[REST, 2], score=-5.0, times=[0, 4]))
    assert (heard.tokens, heard.score, begins) == ([1, 3, 2], -5.0, [0, 2])
    assert heard.context_score == -(2 * REST_PENALTY + REST_COST)
    lines = tuple(f"a b {'ab ' * (n % 7)}{'ba ' * (n % 11)}{'aab ' * (n % 13)}" for n in range(1001))
    assert len(PhraseGraph(Grammar(lines=lines), VOCABULARY)._arcs) < sum(map(len, lines)) / 5


def test_a_beam_that_is_too_small_for_a_grammar_loses_words_but_fails_no_recording():
    rule = EndpointRule(must_contain_nonsilence=True, min_trailing_silence=0.3, min_utterance_length=0.5)
    options = DecodingOptions(
        beam_size=1, blank_penalty=10, search="ctc_prefix_beam", endpoint=EndpointConfig(rule2=rule)
    )
    grammar = Grammar(
        lines=("<n> <n>", "<n> = one | two | three | four | five | six | seven | eight | nine | zero", "[unk]")
    )
    clip = DEMO_FOLDER / "clips" / "phone_number.flac"
    assert Recognizer.from_pretrained().transcribe(clip, options=options, grammar=grammar).complete
