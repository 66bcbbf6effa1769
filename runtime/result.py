"""Results as data: text, words with times and confidences, alternatives; and spans from token peaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class WordResult:
    """A word, its times in seconds from the start of the audio, and its confidence between 0 and 1, if known.

    Words begin and end at pauses in the audio; without a pause they meet halfway between the peaks of their tokens.

    The confidence is the probability of the word's least probable token: that of the CTC head at its peak or, with a
    second pass, the mean of that and of each decoder's. If a bundle has a `Calibration`, seven in ten words with a
    confidence of 0.7 are correct.
    """

    word: str
    start: float
    end: float
    confidence: float | None


@dataclass(frozen=True, kw_only=True)
class PhraseResult:
    """A phrase of a grammar, its times in seconds from the start of the audio, and the least confidence of its words.

    In a partial result it begins and ends at the peaks of its first and last token.
    """

    phrase: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """One hypothesis of the n-best list.

    Attributes:
        text: recognised text.
        tokens: token ids.
        times: seconds at which each token peaks; empty where only the decoder searched.
        score: score that the list is sorted by: of both passes, or of the first if there is no second.
        ctc_score: score of the first pass; None if only the decoder searched.
        attention_score: score of the second pass; None without one.
        language_score: score of the language model, part of `ctc_score`; None without one.
    """

    text: str
    tokens: list[int]
    score: float
    ctc_score: float | None
    attention_score: float | None
    language_score: float | None = None
    times: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The partial or final result of one utterance.

    Attributes:
        text: recognised text.
        is_final: False: a partial result of the first pass, which may still change.
        segment: number of the segment in its stream or recording, from 0. Each has exactly one final result. Utterances
            without words are not counted and have none, except that the last result of a stream is always final.
        start: start of the first word in seconds from the start of the audio; 0 without a text. Where the words of a
            text have no times, that of the utterance.
        end: end of the last word in seconds, in the same way.
        tokens: token ids.
        times: seconds at which each token peaks.
        words: words with times. (Tokens found only by the decoder may have no alignment, and then no times.)
        confidence: mean confidence of the words, roughly the share of correct ones; None without words.
        score: score of the best alternative.
        nbest: alternatives, best first, each text once (with its best tokenization); empty in a partial result.
        committed: the beginning of `text` that no later partial result of this segment changes: all hypotheses of the
            first pass begin with it, and its last word is complete. All of a final text.
        num_committed: number of its words.
        committed_end: seconds from the start of the audio before which the first pass changes nothing any more.
        revised: in a final result, how many of the words that the first pass had committed are now others, missing or
            new.
        phrases: the phrases of a grammar; in a partial result, those that no later result of this segment takes back.
    """

    text: str
    is_final: bool
    segment: int = 0
    start: float = 0.0
    end: float = 0.0
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    words: list[WordResult] = field(default_factory=list)
    confidence: float | None = None
    score: float = 0.0
    nbest: list[Alternative] = field(default_factory=list)
    committed: str = ""
    num_committed: int = 0
    committed_end: float = 0.0
    revised: int = 0
    phrases: list[PhraseResult] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """The transcript of one recording.

    Attributes:
        text: text of all segments.
        duration: seconds of audio that were read.
        segments: final results, in order.
        complete: whether the recording was read to its end; False: it is damaged, and this is the transcript up to the
            damage.
        error: what is wrong with the recording, if it is not complete.
    """

    text: str
    duration: float
    segments: list[Result]
    complete: bool = True
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Alignment(Transcript):
    """The transcript of a recording that was given, with times; its segments are the sentences of the text.

    Words are as they are written, with their punctuation. Their confidence is their score: the geometric mean of the
    probabilities of their tokens, each where it is most probable.

    Attributes:
        misfits: words with a lower score than is allowed, which are probably not said there: what was said instead is
            heard at their times, or nothing.
        unwritten: start and end in seconds of stretches in which the model hears words that are not in the text.
    """

    misfits: list[WordResult] = field(default_factory=list)
    unwritten: list[tuple[float, float]] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """A line for each of `misfits` and `unwritten`, for people."""
        words = [
            f"{each.word!r} at {each.start:.2f} s does not fit (score {each.confidence:.4f})" for each in self.misfits
        ]
        return [*words, *(f"{start:.2f} to {end:.2f} s: the text lacks what is heard" for start, end in self.unwritten)]


def moved(result: Result, seconds: float, segment: int) -> Result:
    """The result as segment number `segment` of a longer recording, shifted by `seconds`."""
    return replace(_timed(result, lambda time: round(time + seconds, 3)), segment=segment)


def without_padding(result: Result, lead_s: float, end_s: float) -> Result:
    """The result with times within the audio, which ends at `end_s`.

    Those of this one count from the start of `lead_s` seconds of silence before it.
    """
    return _timed(result, lambda time: round(min(max(time - lead_s, 0.0), end_s), 3))


def _timed(result: Result, clock: Callable[[float], float]) -> Result:
    """The result with times by another clock."""
    words = [replace(word, start=clock(word.start), end=clock(word.end)) for word in result.words]
    phrases = [replace(each, start=clock(each.start), end=clock(each.end)) for each in result.phrases]
    return replace(
        result,
        start=clock(result.start) if result.text else 0.0,
        end=clock(result.end) if result.text else 0.0,
        committed_end=clock(result.committed_end),
        times=[clock(time) for time in result.times],
        words=words,
        phrases=phrases,
        nbest=[replace(each, times=[clock(time) for time in each.times]) for each in result.nbest],
    )
