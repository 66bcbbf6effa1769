"""Results: text, words with times and confidences, and alternatives."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class WordResult:
    """A word, its start and end in seconds from the start of the audio, and its confidence (0 to 1; None if unknown).

    Words begin and end at pauses in the audio. If no pause separates two words, they meet halfway between two peaks:
    that of the earlier word's last token, and that of the later word's first token.

    The confidence is the probability of the word's least probable token. Without a second pass, the probability of a
    token is the CTC head's probability at the token's peak. With a second pass, it is the mean of the probabilities
    from the CTC head and from each decoder. If the bundle has a `Calibration`, about 70 % of the words with a
    confidence of 0.7 are correct.
    """

    word: str
    start: float
    end: float
    confidence: float | None


@dataclass(frozen=True, kw_only=True)
class PhraseResult:
    """A phrase of a grammar, its start and end in seconds, and the lowest confidence of its words.

    Times count from the start of the audio. In a partial result, the phrase lasts from the encoder frame where its
    first token peaks to the one where its last token peaks.
    """

    phrase: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A hypothesis of the n-best list.

    Attributes:
        text: recognised text.
        tokens: token ids.
        times: time in seconds at which each token peaks; empty if the search uses only the decoder.
        score: score by which the list is sorted. With two passes, it combines the scores of both; otherwise it is the
            score of the only search.
        ctc_score: score of the first pass; None if the search uses only the decoder.
        attention_score: score of the second pass; None without a second pass.
        language_score: score of the language model, a part of `ctc_score`; None without a language model.
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
        is_final: whether the result is final. A partial result comes from the first pass and may still change.
        segment: index of the segment in its stream or recording, from 0. Each segment has exactly one final result.
            Utterances without words have no result and are not counted. The last result of a stream is always final.
        start: start of the first word in seconds from the start of the audio; 0 without text. If the words have no
            times, the start of the utterance.
        end: end of the last word in seconds. If the words have no times, the end of the utterance.
        tokens: token ids.
        times: time in seconds at which each token peaks.
        words: words with times. Empty if the search uses only the decoder and its tokens cannot be aligned.
        confidence: mean confidence of the words, roughly the share of correct words; None without words.
        score: score of the best alternative.
        nbest: alternatives, best first. Each text occurs once, with its best tokenization. Empty in a partial result.
        committed: beginning of `text` that no later partial result of this segment changes. It ends with a complete
            word. Every first-pass hypothesis that may still become the best begins with `committed`. In a final result,
            it is the whole text.
        num_committed: number of words in `committed`.
        committed_end: time in seconds before which the result of the first pass no longer changes.
        revised: in a final result, number of words that the second pass replaced, removed or added in the text that the
            first pass had committed.
        phrases: phrases of a grammar. A partial result contains only those that no later partial result of this segment
            removes. If the second pass removes one, its words count as `revised`.
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
        complete: whether the recording was read to its end. If False, the transcript ends where the recording is
            damaged.
        error: why the transcript is incomplete; None if it is complete.
    """

    text: str
    duration: float
    segments: list[Result]
    complete: bool = True
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Alignment(Transcript):
    """A given text that is aligned with its recording. Its segments are the sentences of the text.

    Words keep their spelling and punctuation. The confidence of a word is its score: the geometric mean of the
    probabilities of its tokens, each taken at its most probable frame.

    Attributes:
        misfits: words with a score below the `min_score` given to `align`. Something else, or nothing, was probably
            said there.
        unwritten: start and end in seconds of each stretch in which the model recognises words that are not in the
            text.
    """

    misfits: list[WordResult] = field(default_factory=list)
    unwritten: list[tuple[float, float]] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """A readable line for each item of `misfits` and `unwritten`."""
        words = [
            f"{each.word!r} at {each.start:.2f} s does not fit (score {each.confidence:.4f})" for each in self.misfits
        ]
        return [*words, *(f"{start:.2f} to {end:.2f} s: the text is missing words" for start, end in self.unwritten)]


def moved(result: Result, seconds: float, segment: int) -> Result:
    """Return the result as segment number `segment` of a longer recording, with times shifted by `seconds`."""

    def later(time: float) -> float:
        return round(time + seconds, 3)

    start, end = (later(time) if result.text else 0.0 for time in (result.start, result.end))
    words = [replace(word, start=later(word.start), end=later(word.end)) for word in result.words]
    phrases = [replace(each, start=later(each.start), end=later(each.end)) for each in result.phrases]
    nbest = [replace(each, times=list(map(later, each.times))) for each in result.nbest]
    return replace(
        result,
        segment=segment,
        start=start,
        end=end,
        committed_end=later(result.committed_end),
        times=list(map(later, result.times)),
        words=words,
        phrases=phrases,
        nbest=nbest,
    )
