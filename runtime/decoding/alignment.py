"""Forced alignment of tokens with the CTC output, cut points between words, and alignment of texts with recordings."""

import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from u2moe.runtime.decoding.pauses import Span, word_spans
from u2moe.runtime.decoding.stream_state import StreamState
from u2moe.runtime.errors import AlignmentError
from u2moe.runtime.language.sentences import written_sentences
from u2moe.runtime.result import Alignment, Result, WordResult
from u2moe.runtime.text.vocabulary import Spelling, Vocabulary, Word, join_texts

_BLOCK_LEN = 2048
"""Encoder frames per block. Scores are stored once per block; tracing a path recomputes the scores in between."""
_MOST_IN_MEMORY = 1 << 26  # bytes of scores and log-probabilities kept in memory. The rest goes to a temporary file
MIN_SCORE = 0.01
"""Default limit: words with a lower score are misfits."""
_MOST_SHOWN = 5
_LEAST_UNWRITTEN_S = 0.5  # minimum seconds of speech to report as missing from the text


@dataclass(frozen=True, kw_only=True)
class AlignedToken:
    """A token of the most probable alignment: its encoder frames from `start` to `end` (exclusive).

    `peak` is the first frame at which the token is most probable, and `confidence` its probability there.
    """

    token: int
    start: int
    end: int
    peak: int
    confidence: float


class Aligner:
    """Finds the most probable CTC alignment of a token sequence. Log-probabilities may arrive in parts of any length.

    The search is exact (Viterbi), even for long recordings. Its time grows with the product of frames and tokens.
    Only the log-probabilities of the sequence's tokens and the scores of every 2048th frame are stored. Data beyond
    64 MB goes to a temporary file.

    `num_frames` is the number of frames so far, and `num_needed` the minimum: one for each token, and one for the blank
    between two equal tokens. Raises ValueError if a token is blank or outside the vocabulary.
    """

    def __init__(self, tokens: Sequence[int], vocab_size: int, blank: int = 0) -> None:
        if any(token == blank or not 0 <= token < vocab_size for token in tokens):
            raise ValueError(f"tokens must be ids below {vocab_size} other than blank {blank}, got {list(tokens)}")
        self.num_frames = 0
        self._tokens = np.asarray(tokens, np.int64)
        # The first of the kept columns is the blank.
        kept, columns = np.unique(self._tokens, return_inverse=True)
        self._kept, self._columns = np.concatenate([[blank], kept]), columns + 1
        # Blank is optional between two different tokens.
        self._skip = np.where(np.diff(self._tokens, prepend=blank) != 0, 0.0, -np.inf)
        self._skip[:1] = -np.inf
        self.num_needed = len(self._tokens) + int(np.isneginf(self._skip[1:]).sum())
        # Scores of paths that end in a blank (one before each token and one after the last), and of paths that end in
        # a token. All paths begin in the first blank, before the first frame.
        self._blanks = np.full(len(self._tokens) + 1, -np.inf)
        self._blanks[0] = 0.0
        self._ends = np.full(len(self._tokens), -np.inf)
        self._waiting = np.zeros((0, len(self._kept)), np.float32)  # less than a block
        self._blocks = tempfile.SpooledTemporaryFile(max_size=_MOST_IN_MEMORY)  # noqa: SIM115 - closed by the finalizer
        weakref.finalize(self, self._blocks.close)

    def advance(self, log_probs: npt.NDArray[np.float32]) -> None:
        """Add frames, given their log-probabilities [time, vocab]."""
        self.num_frames += len(log_probs)
        self._waiting = np.concatenate([self._waiting, log_probs[:, self._kept]])
        while len(self._waiting) >= _BLOCK_LEN:
            self._search(self._waiting[:_BLOCK_LEN])
            self._waiting = self._waiting[_BLOCK_LEN:]

    def finish(self) -> list[AlignedToken] | None:
        """Return the tokens in order, with spans that do not overlap; None if no alignment is possible."""
        self._search(self._waiting)
        if not len(self._tokens):
            return []
        if not max(self._ends[-1], self._blanks[-1]) > -np.inf:
            return None
        path, log_probs = self._trace()
        # State 2 i is the blank before token i, and state 2 i + 1 is the token.
        starts = np.searchsorted(path, 2 * np.arange(len(self._tokens)) + 1)
        ends = np.searchsorted(path, 2 * np.arange(len(self._tokens)) + 2)
        aligned = []
        for token, start, end in zip(self._tokens.tolist(), starts.tolist(), ends.tolist(), strict=True):
            peak = start + int(log_probs[start:end].argmax())
            confidence = min(float(np.exp(log_probs[peak])), 1.0)
            aligned.append(AlignedToken(token=token, start=start, end=end, peak=peak, confidence=confidence))
        return aligned

    def _search(self, frames: npt.NDArray[np.float32]) -> None:
        """Store the scores and a block of frames [time, kept]; then advance the scores over the block."""
        for part in (self._blanks, self._ends, np.ascontiguousarray(frames, np.float32)):
            self._blocks.write(part.tobytes())
        _viterbi(self._blanks, self._ends, frames.astype(np.float64), self._columns, self._skip)

    def _trace(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Trace back the best path; return its state and log-probability in each frame, both [time]."""
        num_tokens, num_kept = len(self._tokens), len(self._kept)
        path, found = np.empty(self.num_frames, np.int64), np.empty(self.num_frames, np.float32)
        state = 2 * num_tokens - 1 if self._ends[-1] >= self._blanks[-1] else 2 * num_tokens
        scores_len = 8 * (2 * num_tokens + 1)
        for number in range((self.num_frames - 1) // _BLOCK_LEN, -1, -1):
            begin = number * _BLOCK_LEN
            num_frames = min(self.num_frames - begin, _BLOCK_LEN)
            self._blocks.seek(number * (scores_len + 4 * _BLOCK_LEN * num_kept))
            scores = np.frombuffer(self._blocks.read(scores_len))
            frames = np.frombuffer(self._blocks.read(4 * num_frames * num_kept), np.float32).reshape(-1, num_kept)
            # A path passes at most one token per frame, so it cannot reach earlier tokens in this block.
            first, last = max(state // 2 - num_frames, 0), min(state // 2 + 1, num_tokens)
            blanks, ends = scores[first : last + 1].copy(), scores[num_tokens + 1 :][first:last].copy()
            columns, skip = self._columns[first:last], self._skip[first:last].copy()
            if first:
                skip[0] = -np.inf
            steps = np.empty((num_frames, 2 * (last - first) + 1), np.int8)
            _viterbi(blanks, ends, frames.astype(np.float64), columns, skip, steps)
            for frame in range(num_frames - 1, -1, -1):
                path[begin + frame] = state
                found[begin + frame] = frames[frame, self._columns[state // 2] if state % 2 else 0]
                state -= int(steps[frame, state - 2 * first])
        return path, found


def align(log_probs: npt.NDArray[np.float32], tokens: Sequence[int], blank: int = 0) -> list[AlignedToken] | None:
    """Return `tokens` aligned with log-probabilities [time, vocab]; None if no alignment is possible. See `Aligner`."""
    aligner = Aligner(tokens, log_probs.shape[1], blank)
    aligner.advance(log_probs)
    return aligner.finish()


def find_cut(
    vocabulary: Vocabulary, tokens: Sequence[int], log_probs: npt.NDArray[np.float32], blank: int = 0
) -> int | None:
    """Find where to cut an utterance: in the longest pause between two words in the utterance's second half.

    If there is no pause in that half, cut in the last pause. `tokens` are those recognised so far, and `log_probs`
    [time, vocab] those of the utterance. Returns the number of frames before the cut; None if there are fewer than two
    words, or if no alignment is possible.
    """
    words, aligned = vocabulary.words(tokens), align(log_probs, tokens, blank)
    if aligned is None or len(words) < 2:
        return None
    pauses = [(aligned[word.end - 1].end, aligned[following.begin].start) for word, following in pairwise(words)]
    late = [pause for pause in pauses if sum(pause) >= len(log_probs)] or pauses[-1:]
    end, start = max(late, key=lambda pause: (pause[1] - pause[0], pause))
    return (end + start + 1) // 2


def _viterbi(
    blanks: npt.NDArray[np.float64],
    ends: npt.NDArray[np.float64],
    frames: npt.NDArray[np.float64],
    columns: npt.NDArray[np.int64],
    skip: npt.NDArray[np.float64],
    steps: npt.NDArray[np.int8] | None = None,
) -> None:
    """Advance scores over `frames` [time, kept], in place: of paths that end in a blank or in a token; see `Aligner`.

    `columns` are the columns of the tokens in `frames`. `skip` is 0 for a token that may follow the previous token
    without a blank, else -inf. States alternate between blank and token. `steps` [time, 2 * tokens + 1] receives, for
    each frame, by how many states the best path to each state advances.
    """
    before = np.full(len(ends), -np.inf)
    for number, frame in enumerate(frames):
        before[1:] = ends[:-1]
        before += skip
        if steps is not None:
            steps[number, 0] = 0
            steps[number, 1::2] = np.stack([ends, blanks[:-1], before]).argmax(axis=0)
            steps[number, 2::2] = ends > blanks[1:]
        np.maximum(before, blanks[:-1], out=before)
        np.maximum(blanks[1:], ends, out=blanks[1:])
        blanks += frame[0]
        np.maximum(ends, before, out=ends)
        ends += frame[columns]


class TextAligner:
    """Aligns a text with a recording whose utterances arrive in order.

    The text has sentences in any letter case. A sentence ends at ".", "!", "?" or a line end. Raises AlignmentError if
    the text has no words, or words that cannot be written with the vocabulary.
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
        """Return the alignment of the whole recording, after the last utterance. Words below `min_score` are misfits.

        Raises AlignmentError if no speech is heard, or if the recording is too short for the text.
        """
        frame_s, duration, clock = stream.frame_s, stream.extractor.end_s, stream.clock()
        aligned, heard = self._aligner.finish(), np.concatenate([np.zeros(0, bool), *self._heard])
        if not heard.any():
            raise AlignmentError(f"no speech was found in {duration:.1f} s of audio")
        if aligned is None:
            needed_s = self._aligner.num_needed * frame_s
            raise AlignmentError(f"the text needs at least {needed_s:.1f} s of audio, found {duration:.1f} s")
        words = [word for _, words in self._sentences for word in words]
        spans = iter(word_spans(words, [token.peak for token in aligned], frame_s, self._pauses, num_frames=len(heard)))
        segments = []
        for number, (text, own) in enumerate(self._sentences):
            timed = [
                WordResult(word=word.text, start=clock(start), end=clock(end), confidence=score_of(aligned, word))
                for word, (start, end) in zip(own, spans, strict=False)
            ]
            segments.append(
                Result(
                    text=text,
                    is_final=True,
                    segment=number,
                    start=timed[0].start,
                    end=timed[-1].end,
                    words=timed,
                    confidence=sum(word.confidence or 0.0 for word in timed) / len(timed),
                    committed=text,
                    num_committed=len(timed),
                    committed_end=timed[-1].end,
                )
            )
        found = [word for segment in segments for word in segment.words]
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
    return float(np.exp(np.log(np.maximum(probabilities, 1e-30)).mean()))


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
