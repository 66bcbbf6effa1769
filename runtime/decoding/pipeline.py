"""Runs many streams through these stages: windows, encoder, CTC head, first pass, cuts, second pass, conclusion."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from u2moe.runtime.decoding.alignment import align, find_cut
from u2moe.runtime.decoding.ctc import Hypothesis
from u2moe.runtime.decoding.pauses import word_spans
from u2moe.runtime.decoding.rescoring import Rescored, attention_beam_search, attention_rescoring, word_confidence
from u2moe.runtime.decoding.stream_state import StreamState
from u2moe.runtime.decoding.utterance import Frames
from u2moe.runtime.model.device import Value, joined
from u2moe.runtime.model.encoder import CacheRow, join_rows, required_cache_size, split_rows
from u2moe.runtime.model.model import Model, batches_of
from u2moe.runtime.options import SHORTEST_PAUSE_S
from u2moe.runtime.result import Alternative, PhraseResult, Result, WordResult
from u2moe.runtime.text.vocabulary import Word

MAX_BATCH = 32
"""Largest encoder batch in chunks. Larger ones save no time but take more memory."""
_MAX_WHOLE = 8
_MAX_WHOLE_FRAMES = 6000
"""Largest batch of windows with full context, in windows and in feature frames (a minute of audio). The memory of
attention is quadratic in the length, and larger batches save no more time."""
_MOST_PADDING = 1.1  # largest ratio of the longest to the shortest window of such a batch

Chunk = tuple[StreamState, npt.NDArray[np.float32]]
"""A stream and a window of its features [frames, mel]."""
Ended = tuple[StreamState, list[Hypothesis]]
"""A stream whose current utterance has ended, and the utterance's first-pass hypotheses, best first."""
T = TypeVar("T", bound=tuple[StreamState, Any])
R = TypeVar("R")


@dataclass(frozen=True)
class Concluded:
    """An utterance that has ended, with or without words. Encoder frames count from the start of the stream.

    `window_start` is the first encoder frame of the last encoded window, and `window_len` its number of feature frames.
    """

    start: int
    num_frames: int
    window_start: int
    window_len: int
    result: Result


@dataclass(frozen=True, kw_only=True)
class Observer:
    """Hooks for measurements, called in the decoding thread.

    `features` returns a context manager for the computation of features, `searching` for each step of the first pass,
    including hotwords and endpoints. `concluded` is called with each finished utterance before the next one begins.
    """

    features: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    searching: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    concluded: Callable[[Concluded], object] = lambda _: None


class Pipeline:
    """Decodes any number of streams of one model together. Keeps no state of the streams."""

    def __init__(self, model: Model, observer: Observer | None = None) -> None:
        self._model = model
        self._observer = observer or Observer()

    def decode(self, streams: Sequence[StreamState]) -> None:
        """Do all work that is ready: every complete window, and the second pass of every finished utterance.

        If a stream has failed, its error (`StreamState.failure`) is raised once all other streams are done.
        """
        with contextlib.ExitStack() as claims:
            for stream in streams:
                claims.enter_context(stream.claim())
            while True:
                self._settle(_working(streams))
                with self._observer.features():
                    windows = [(stream, stream.take_window()) for stream in _working(streams)]
                chunks = [(stream, window) for stream, window in windows if window is not None]
                if not chunks:
                    break
                for batch in _batches(chunks):
                    for (stream, _), (frames, row) in _apart(self._frames, batch):
                        with stream.failing(), self._observer.searching():
                            stream.advance(frames, row)
        failure = next((stream.failure for stream in streams if stream.failure is not None), None)
        if failure is not None:
            raise failure

    def _settle(self, streams: Sequence[StreamState]) -> None:
        """Conclude finished utterances. With full context, restart those that may continue; long ones are cut first."""
        while ended := [stream for stream in _working(streams) if stream.is_searched]:
            for stream in ended:
                endpoint = stream.utterance.endpoint
                # After such a short silence, the endpoint may split a word.
                if endpoint is not None and endpoint.trailing_silence * stream.frame_s < SHORTEST_PAUSE_S:
                    with stream.failing():
                        self._cut(stream)
            self._conclude(_working(ended))
        for stream in (each for each in _working(streams) if each.may_go_on):
            with stream.failing():
                # The utterance is encoded again with the next audio. If it fills most of the window, it is cut first.
                if 2 * stream.utterance.num_frames > stream.extractor.num_window_frames:
                    self._cut(stream)
                    self._conclude([stream])
                stream.begin_again()

    def _cut(self, stream: StreamState) -> None:
        """Cut the current utterance between two of its words, if it has at least two."""
        if not (hypotheses := stream.utterance.search.hypotheses(1)):  # of a grammar, if the beam is too small for it
            return
        log_probs = self._model.ctc(stream.utterance.encoder_out())
        best, _ = stream.utterance.heard(hypotheses[0])
        num_frames = find_cut(stream.vocabulary, best.tokens, log_probs, self._model.config.blank)
        if num_frames is not None:
            stream.cut(num_frames, log_probs)

    def _conclude(self, streams: Sequence[StreamState]) -> None:
        """Finish the search of each current utterance, and compute its final result."""
        ended: list[Ended] = []
        for stream in streams:
            with stream.failing(), self._observer.searching():
                stream.utterance.search.finish()
                ended.append((stream, stream.utterance.search.hypotheses()))
        for (stream, _), result in _apart(final_results, ended):
            own, window_len = stream.utterance, len(stream.extractor.window)
            self._observer.concluded(Concluded(own.start, own.num_frames, stream.window_start, window_len, result))
            with stream.failing():
                stream.conclude(result)

    def _frames(self, chunks: Sequence[Chunk]) -> list[tuple[Frames, CacheRow]]:
        """Run the encoder and the CTC head, each once; return the encoder frames and next caches of each stream."""
        config, encoder, options = self._model.config, self._model.encoder, chunks[0][0].options
        lengths = np.array([len(window) for _, window in chunks])
        features = np.zeros((len(chunks), lengths.max(), chunks[0][1].shape[1]), np.float32)
        for row, (_, window) in zip(features, chunks, strict=True):
            row[: len(window)] = window
        if options.chunk_size is None:
            caches, required = encoder.start(len(chunks)), 0
        else:
            caches = join_rows([stream.caches for stream, _ in chunks])
            required = required_cache_size(options.chunk_size, options.num_left_chunks)
        output, following = encoder.step(features, caches, required_cache_size=required, chunk_lens=lengths)
        lens = ((lengths - config.window) // config.subsampling_rate + 1).tolist()
        num_cached = [stream.caches.num_cached + num for (stream, _), num in zip(chunks, lens, strict=True)]
        rows = split_rows(following, [min(num, required) if required >= 0 else num for num in num_cached])
        outputs = [output[row, :num] for row, num in enumerate(lens)]
        if following.log_probs is None:
            log_probs = self._model.ctc(joined(outputs, 0) if len(outputs) > 1 else outputs[0])
            parts = [log_probs[end - num : end] for num, end in zip(lens, accumulate(lens), strict=True)]
        else:
            parts = [row[:num] for row, num in zip(following.log_probs, lens, strict=True)]
        frames = (Frames(output=own.copy(), log_probs=part) for own, part in zip(outputs, parts, strict=True))
        return list(zip(frames, rows, strict=True))


def _batches(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Yield batches of limited size. The chunks of a batch have the same chunk size and left context."""
    groups: dict[tuple[int | None, int], list[Chunk]] = {}
    for chunk in chunks:
        groups.setdefault((chunk[0].options.chunk_size, chunk[0].options.num_left_chunks), []).append(chunk)
    for (chunk_size, _), group in groups.items():
        if chunk_size is None:
            yield from batches_of(sorted(group, key=lambda chunk: len(chunk[1])), _is_alike)
        else:
            yield from batches_of(group, lambda batch, _: len(batch) < MAX_BATCH)


def _is_alike(batch: list[Chunk], longer: Chunk) -> bool:
    """Return whether padding shorter windows with full context to this one's length costs less than another call."""
    num_frames = len(longer[1])
    is_full = len(batch) == _MAX_WHOLE or (len(batch) + 1) * num_frames > _MAX_WHOLE_FRAMES
    return not is_full and num_frames <= _MOST_PADDING * len(batch[0][1])


def _working(streams: Sequence[StreamState]) -> list[StreamState]:
    """Return the streams that have not failed."""
    return [stream for stream in streams if stream.failure is None]


def _apart(compute: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> Iterator[tuple[T, R]]:
    """Yield each item with its result, from one call. If it fails, bisect: streams of faulty items get a `failure`."""
    try:
        results = compute(items)
    except Exception as error:  # noqa: BLE001 - any error may concern only some items
        if len(items) == 1:
            items[0][0].failure = error
            return
        for half in (items[: len(items) // 2], items[len(items) // 2 :]):
            yield from _apart(compute, half)
    else:
        yield from zip(items, results, strict=True)


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
        lambda tokens: model.token_scores(encoder_out, tokens).next,
        len(encoder_out),
        beam_size=options.beam_size,
        eos=config.eos,
        length_penalty=options.length_penalty,
        count_sos=config.sos != config.eos,
    )
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
            text=text,
            tokens=hypothesis.tokens,
            times=list(map(seconds, hypothesis.times)),
            score=rescored[i].score if rescored else hypothesis.score,
            ctc_score=hypothesis.score if stream.options.search != "attention" else None,
            attention_score=rescored[i].attention_score if rescored else None,
            language_score=hypothesis.language_score if stream.fusion is not None else None,
        )
    alternatives = list(nbest.values())[: stream.options.beam_size]  # hotwords may have added more
    return Result(
        text=alternatives[0].text,
        is_final=True,
        segment=utterance.number,
        tokens=best.tokens,
        start=words[0].start if words else begin_s if best.tokens else 0.0,
        end=words[-1].end if words else end_s if best.tokens else 0.0,
        times=list(map(seconds, best.times)),
        words=words,
        score=alternatives[0].score,
        nbest=alternatives,
        confidence=sum(word.confidence or 0.0 for word in words) / len(words) if words else None,
        committed=alternatives[0].text,
        num_committed=len(vocabulary.words(best.tokens)),
        committed_end=end_s,
        revised=utterance.num_revised(vocabulary, best.tokens),
        phrases=phrases,
    )


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
    """Restore a hypothesis from before `heard`: a `rest` token gets the lowest probability of its replacements."""
    place = next(place for place, (each, _) in enumerate(heard) if each is rescored.hypothesis)
    probabilities = rescored.token_probabilities
    least = np.minimum.reduceat(probabilities, heard[place][1]).tolist() if probabilities else []
    return dataclasses.replace(rescored, hypothesis=found[place], token_probabilities=least)
