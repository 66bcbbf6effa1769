"""Results as data: text, words with times and confidences, alternatives; and how token peaks become spans."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from u2moe.runtime.text import join_texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from u2moe.runtime.text import Word

LONGEST_TOKEN_S = 1.0
"""A token extends no further from its peak than half of this."""


@dataclass(frozen=True, kw_only=True)
class WordResult:
    """A word, its times in seconds from the start of the audio, and its confidence between 0 and 1, if known.

    Words begin and end at pauses in the audio; without one they meet halfway between the peaks of their tokens.

    The confidence is the probability of the word's least probable token: by the CTC head where it peaks, and with a
    second pass the mean of that and of each decoder's. A bundle may have a `Calibration` for them, so that of words
    with 0.7 seven in ten are correct.
    """

    word: str
    start: float
    end: float
    confidence: float | None


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """One hypothesis of the n-best list.

    Attributes:
        text: what was said.
        tokens: token ids.
        score: what the list is sorted by: of both passes, or of the first where there is no second.
        ctc_score: of the first pass; None where the decoder searched alone.
        attention_score: of the second pass; None without one.
    """

    text: str
    tokens: list[int]
    score: float
    ctc_score: float | None
    attention_score: float | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was recognised in one utterance, so far or finally.

    Attributes:
        text: what was said.
        is_final: False: a partial result of the first pass, which may grow and change.
        segment: number of the utterance in its stream or recording, from 0. It never changes, and each has one final
            result. Utterances without words have none and are not counted, except that the last result of a stream is
            always final.
        start: first word's start in seconds from the start of the audio; 0 without words.
        end: last word's end in seconds; 0 without words.
        tokens: token ids.
        times: seconds at which each token peaks.
        words: with times. (Tokens that the decoder alone has found may fit no alignment, and then have no times.)
        confidence: mean of the words' confidences, about the share of them that are correct; None without words.
        score: of the best alternative.
        nbest: alternatives, best first, each text once (with the best of its spellings); none in a partial result.
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

    def moved(self, seconds: float, segment: int) -> Result:
        """The same as segment number `segment` of a longer recording in which it begins after `seconds`."""
        words = [
            replace(word, start=round(word.start + seconds, 3), end=round(word.end + seconds, 3)) for word in self.words
        ]
        return replace(
            self,
            segment=segment,
            start=words[0].start if words else 0.0,
            end=words[-1].end if words else 0.0,
            times=[round(time + seconds, 3) for time in self.times],
            words=words,
        )


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """What was recognised in one recording.

    Attributes:
        text: of all segments.
        duration: seconds of audio that were read.
        segments: final results, in order.
        complete: whether the recording was read to its end; False: it is damaged, and what was recognised before the
            damage is here.
        error: what is wrong with the recording, if it is not complete.
    """

    text: str
    duration: float
    segments: list[Result]
    complete: bool = True
    error: str | None = None

    @classmethod
    def of(cls, segments: Sequence[Result], duration: float, error: Exception | None = None) -> Transcript:
        """Transcript of final results, in order, of a recording that breaks off with `error`, if it does."""
        return cls(
            text=join_texts([segment.text for segment in segments]),
            duration=duration,
            segments=list(segments),
            complete=error is None,
            error=None if error is None else str(error),
        )


def token_spans(times: Sequence[int], frame_s: float, duration: float) -> list[tuple[float, float]]:
    """Start and end of each token in seconds, from the encoder frames at which they peak.

    As WeNet's `gen_timestamps_from_peak`: tokens meet halfway between their peaks, but extend no further than half a
    second from their own, and stay within the audio.
    """
    spans = []
    for index, time in enumerate(times):
        peak = time * frame_s
        start, end = peak - LONGEST_TOKEN_S / 2, peak + LONGEST_TOKEN_S / 2
        start = max(start, (times[index - 1] + time) / 2 * frame_s if index > 0 else 0.0)
        end = min(end, (time + times[index + 1]) / 2 * frame_s if index + 1 < len(times) else duration)
        spans.append((start, end))
    return spans


def words_of(
    words: Sequence[Word], spans: Sequence[tuple[float, float]], confidences: Sequence[float]
) -> list[WordResult]:
    """Words with their spans in seconds and their confidences."""
    return [
        WordResult(word=word.text, start=round(start, 3), end=round(end, 3), confidence=confidence)
        for word, (start, end), confidence in zip(words, spans, confidences, strict=True)
    ]
