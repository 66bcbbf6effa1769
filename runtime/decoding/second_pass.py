"""From first-pass hypotheses to the final result of an utterance: second pass, text, words and times."""

import dataclasses
from collections.abc import Sequence
from functools import cache

import numpy as np

from u2moe.runtime.decoding.alignment import align
from u2moe.runtime.decoding.ctc import Hypothesis
from u2moe.runtime.decoding.pauses import word_spans
from u2moe.runtime.decoding.rescoring import Rescored, attention_beam_search, attention_rescoring, word_confidence
from u2moe.runtime.decoding.stream_state import StreamState
from u2moe.runtime.model.device import Value
from u2moe.runtime.result import Alternative, PhraseResult, Result, WordResult
from u2moe.runtime.text.vocabulary import Word

Ended = tuple[StreamState, list[Hypothesis]]
"""A stream whose current utterance has ended, and the utterance's first-pass hypotheses, best first."""


def final_results(ended: Sequence[Ended]) -> list[Result]:
    """Return the final result of each utterance, by its stream's search. Similar lengths share a decoder call."""
    outputs = [stream.utterance.encoder_out() for stream, _ in ended]
    heard = {
        index: [stream.utterance.heard(each) for each in hypotheses]
        for index, (stream, hypotheses) in enumerate(ended)
        if stream.options.search == "attention_rescoring" and len(outputs[index]) and hypotheses
    }
    utterances = [(outputs[index], [each.tokens for each, _ in own]) for index, own in heard.items()]
    scores = iter(ended[0][0].model.token_scores_of(utterances) if utterances else ())
    results = []
    for index, (stream, hypotheses) in enumerate(ended):
        found, second = hypotheses, None
        if index in heard:
            second = attention_rescoring([each for each, _ in heard[index]], next(scores), stream.weights)
            if stream.grammar is not None and stream.grammar.rest is not None:
                second = [_as_found(each, hypotheses, heard[index]) for each in second]
            found = [each.hypothesis for each in second]
        elif stream.options.search == "attention" and len(outputs[index]):
            found = _attention_search(stream, outputs[index])
        results.append(stream.presented(_result(stream, found, second)))
    return results


def _attention_search(stream: StreamState, encoder_out: Value) -> list[Hypothesis]:
    """Return the hypotheses found with only the decoder. The best one gets token times if CTC can align it."""
    model, config, options = stream.model, stream.model.config, stream.options
    found = attention_beam_search(
        lambda tokens: model.token_scores(encoder_out, tokens).next, len(encoder_out), beam_size=options.beam_size,
        eos=config.eos, length_penalty=options.length_penalty, count_sos=config.sos != config.eos,
    )  # fmt: skip
    aligned = None
    if not {config.blank, config.sos, config.eos} & set(found[0].tokens):
        aligned = align(model.ctc(encoder_out), found[0].tokens, config.blank)
    if aligned:
        times, probabilities = [token.peak for token in aligned], [token.confidence for token in aligned]
        found[0] = dataclasses.replace(found[0], times=times, probabilities=probabilities)
    return found


def _result(stream: StreamState, hypotheses: list[Hypothesis], rescored: list[Rescored] | None) -> Result:
    """Build the result from hypotheses, best first, and from their second-pass scores, if any."""
    frame_s, utterance, vocabulary, clock = stream.frame_s, stream.utterance, stream.vocabulary, stream.clock()
    begin_s, end_s = clock(utterance.start * frame_s), clock(utterance.end * frame_s)
    seconds = cache(lambda time: clock((utterance.start + time) * frame_s))  # hypotheses have many in common
    if not hypotheses:
        return Result(text="", is_final=True, segment=utterance.number, committed_end=end_s)
    best = hypotheses[0]
    probabilities = rescored[0].token_probabilities if rescored else best.probabilities
    spans = vocabulary.words(best.tokens) if best.times else []
    words = _words(stream, spans, best.times, probabilities)
    phrases = []
    for begin, end in stream.grammar.phrases(best.tokens) if stream.grammar else ():
        own = [word for span, word in zip(spans, words, strict=True) if begin <= span.begin < end]
        confidence = min(word.confidence or 0.0 for word in own)
        text = vocabulary.text(best.tokens[begin:end])
        phrases.append(PhraseResult(phrase=text, start=own[0].start, end=own[-1].end, confidence=confidence))
    nbest: dict[str, Alternative] = {}
    for i, hypothesis in enumerate(hypotheses):
        text = vocabulary.text(hypothesis.tokens)
        if text in nbest:  # an earlier, better hypothesis has the same text
            continue
        nbest[text] = Alternative(
            text=text, tokens=hypothesis.tokens, times=list(map(seconds, hypothesis.times)),
            score=rescored[i].score if rescored else hypothesis.score,
            ctc_score=hypothesis.score if stream.options.search != "attention" else None,
            attention_score=rescored[i].attention_score if rescored else None,
            language_score=hypothesis.language_score if stream.fusion is not None else None,
        )  # fmt: skip
    alternatives = list(nbest.values())[: stream.options.beam_size]  # hotwords may have added more
    return Result(
        text=alternatives[0].text, is_final=True, segment=utterance.number, tokens=best.tokens,
        start=words[0].start if words else begin_s if best.tokens else 0.0,
        end=words[-1].end if words else end_s if best.tokens else 0.0,
        times=list(map(seconds, best.times)), words=words, score=alternatives[0].score, nbest=alternatives,
        confidence=sum(word.confidence or 0.0 for word in words) / len(words) if words else None,
        committed=alternatives[0].text, num_committed=len(vocabulary.words(best.tokens)), committed_end=end_s,
        revised=utterance.num_revised(vocabulary, best.tokens), phrases=phrases,
    )  # fmt: skip


def _words(
    stream: StreamState, words: list[Word], times: Sequence[int], probabilities: Sequence[float]
) -> list[WordResult]:
    """Return the words of a hypothesis and their times. Word boundaries are moved to the pauses between words."""
    utterance, clock, calibration = stream.utterance, stream.clock(), stream.model.manifest.calibration
    spans = word_spans(
        words, times, stream.frame_s, stream.pauses(), start=utterance.start, num_frames=utterance.num_frames
    )
    confidences = (word_confidence(probabilities[word.begin : word.end], calibration) for word in words)
    return [
        WordResult(word=word.text, start=clock(start), end=clock(end), confidence=confidence)
        for word, (start, end), confidence in zip(words, spans, confidences, strict=True)
    ]


def _as_found(
    rescored: Rescored, found: Sequence[Hypothesis], heard: Sequence[tuple[Hypothesis, list[int]]]
) -> Rescored:
    """Return a second-pass result with the original hypothesis instead of the one from `Utterance.heard`.

    A `rest` token gets the lowest probability of the tokens that replaced it.
    """
    place = next(place for place, (each, _) in enumerate(heard) if each is rescored.hypothesis)
    probabilities = rescored.token_probabilities
    least = np.minimum.reduceat(probabilities, heard[place][1]).tolist() if probabilities else []
    return dataclasses.replace(rescored, hypothesis=found[place], token_probabilities=least)
