"""Aligns a text with encoder output: spells its words, finds their times and scores, and reports misfits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from u2moe.runtime.decoding.alignment import AlignedToken, Aligner
from u2moe.runtime.decoding.pauses import Span, word_spans
from u2moe.runtime.decoding.stream_state import StreamState
from u2moe.runtime.errors import AlignmentError
from u2moe.runtime.language.sentences import written_sentences
from u2moe.runtime.result import Alignment, Result, WordResult
from u2moe.runtime.text.spelling import Spelling
from u2moe.runtime.text.vocabulary import Vocabulary, Word, join_texts

MIN_SCORE = 0.01
"""Default limit: words with a lower score are misfits."""
_MOST_SHOWN = 5
_LEAST_PROBABILITY = 1e-30
_LEAST_UNWRITTEN_S = 0.5
"""Minimum seconds of speech to report as missing from the text."""


class TextAligner:
    """Aligns a text with a recording whose utterances arrive in order.

    The text has sentences in any letter case. A sentence ends at ".", "!", "?" or a line end.

    Raises:
        AlignmentError: the text has no words, or has words that cannot be written with the vocabulary.
    """

    def __init__(self, text: str, vocabulary: Vocabulary, blank: int) -> None:
        self._sentences, self._tokens = _spelled(text, vocabulary)
        self._aligner = Aligner(self._tokens, len(vocabulary), blank)
        self._blank = blank
        self._heard: list[npt.NDArray[np.bool_]] = []
        self._pauses: list[Span] = []

    def advance(self, stream: StreamState) -> None:
        """Add a stream's current utterance. Call this after the utterance has ended."""
        log_probs = stream.model.ctc(stream.utterance.encoder_out())
        self._aligner.advance(log_probs)
        self._heard.append(log_probs.argmax(axis=1) != self._blank)
        for start, end in stream.pauses():
            goes_on = self._pauses and start <= self._pauses[-1][1]  # continues a pause of the previous utterance
            self._pauses.append((self._pauses.pop()[0] if goes_on else start, end))

    def finish(self, stream: StreamState, min_score: float) -> Alignment:
        """Return the alignment of the whole recording. Words below `min_score` are misfits.

        Call this after the last utterance.

        Raises:
            AlignmentError: no speech is heard, or the recording is too short for the text.
        """
        frame_s, lead_s, duration = stream.frame_s, stream.extractor.lead_s, stream.extractor.end_s
        num_frames, needed_s = self._aligner.num_frames, self._aligner.num_needed * frame_s
        aligned, heard = self._aligner.finish(), np.concatenate([np.zeros(0, bool), *self._heard])
        if not heard.any():
            raise AlignmentError(f"no speech was found in {duration:.1f} s of audio")
        if aligned is None:
            raise AlignmentError(f"the text needs at least {needed_s:.1f} s of audio, found {duration:.1f} s")

        def clock(seconds: float) -> float:
            return round(min(max(seconds - lead_s, 0.0), duration), 3)

        words = [word for _, words in self._sentences for word in words]
        spans = word_spans(words, [token.peak for token in aligned], frame_s, self._pauses, num_frames=num_frames)
        found = [
            WordResult(word=word.text, start=clock(start), end=clock(end), confidence=score_of(aligned, word))
            for word, (start, end) in zip(words, spans, strict=True)
        ]
        segments, rest = [], iter(found)
        for number, (text, own) in enumerate(self._sentences):
            timed = list(islice(rest, len(own)))
            scores = [word.confidence or 0.0 for word in timed]
            segments.append(
                Result(
                    text=text,
                    is_final=True,
                    segment=number,
                    start=timed[0].start,
                    end=timed[-1].end,
                    words=timed,
                    confidence=sum(scores) / len(scores),
                    committed=text,
                    num_committed=len(timed),
                    committed_end=timed[-1].end,
                )
            )
        unwritten = _unwritten(heard, aligned, round(_LEAST_UNWRITTEN_S / frame_s))
        return Alignment(
            text=join_texts([segment.text for segment in segments]),
            duration=duration,
            segments=segments,
            misfits=[word for word in found if (word.confidence or 0.0) < min_score],
            unwritten=[(clock(start * frame_s), clock(end * frame_s)) for start, end in unwritten],
        )


def score_of(aligned: Sequence[AlignedToken], word: Word) -> float:
    """Return the geometric mean of a word's token probabilities, which is a better score than the minimum."""
    probabilities = np.array([token.confidence for token in aligned[word.begin : word.end]])
    return float(np.exp(np.log(np.maximum(probabilities, _LEAST_PROBABILITY)).mean()))


def _spelled(text: str, vocabulary: Vocabulary) -> tuple[list[tuple[str, list[Word]]], list[int]]:
    """Return two lists: the sentences of a text with their words as written, and the tokens of the whole text."""
    spelling, before = Spelling(vocabulary), ""
    sentences: list[tuple[str, list[Word]]] = []
    tokens: list[int] = []
    problems: dict[str, None] = {}  # each once, in order
    for number, line in enumerate(text.splitlines(), start=1):
        for sentence, words in written_sentences(line):
            own = []
            for word in words:
                begin = len(tokens)
                for spoken in word.spoken:
                    try:
                        tokens += spelling.tokens(spoken, before, f"line {number}, {word.text!r}")
                    except ValueError as error:
                        problems.setdefault(str(error))
                    before = spoken
                if word.spoken:
                    own.append(Word(text=word.text, begin=begin, end=len(tokens)))
            if own:
                sentences.append((sentence, own))
    if problems:
        more = f"; and {len(problems) - _MOST_SHOWN} more" if len(problems) > _MOST_SHOWN else ""
        shown = "; ".join(list(problems)[:_MOST_SHOWN])
        raise AlignmentError(f"text: {shown}{more}: write what is spoken, with numbers as words")
    if not tokens:
        raise AlignmentError("text: has no words")
    return sentences, tokens


def _unwritten(heard: npt.NDArray[np.bool_], aligned: Sequence[AlignedToken], least: int) -> list[tuple[int, int]]:
    """Return stretches of at least `least` frames where the audio has tokens (`heard` [time]) but the text has none."""
    places = np.flatnonzero(heard)
    edges = [0, *(edge for token in aligned for edge in (token.start - 1, token.end + 1)), len(heard)]
    between = (places[slice(*np.searchsorted(places, gap))] for gap in zip(edges[::2], edges[1::2], strict=True))
    found = ((int(gap[0]), int(gap[-1]) + 1) for gap in between if len(gap))
    return [(begin, end) for begin, end in found if end - begin >= least]
