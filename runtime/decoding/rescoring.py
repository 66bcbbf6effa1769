"""The second pass as arithmetic: attention rescoring, beam search with only the decoder, and confidences of words.

This is WeNet's formula, with weights chosen at run time::

    score = (1 - reverse_weight) * left_to_right + reverse_weight * right_to_left + ctc_weight * ctc

The attention scores are sums of log-probabilities, including eos. WeNet's tools default to ctc_weight 0 and
reverse_weight 0 (Python `recognize.py`), or 0.5 and 0 (C++ runtime). Our defaults are those of the checkpoint's
training, as recorded in the bundle (0.3 and 0.3 in the U2++ recipes).

The bonus of hotwords is not scaled by ctc_weight. If it were, as in WeNet, the bonus could help the first pass to find
a name, but would be too weak to keep that name in the second pass. The score of a language model
has its own factor instead of ctc_weight.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from u2moe.runtime.bundle.manifest import Calibration
from u2moe.runtime.decoding.ctc import Hypothesis
from u2moe.runtime.model.model import TokenScores
from u2moe.runtime.options import RescoringWeights

_SMALLEST = 1e-6  # confidences are clipped to this distance from 0 and 1 to keep their odds finite


@dataclass(frozen=True, kw_only=True)
class Rescored:
    """A hypothesis after the second pass.

    Attributes:
        hypothesis: hypothesis of the first pass, with its score.
        score: combined score of both passes.
        attention_score: score of the second pass, the weighted sum of both directions.
        confidence: geometric mean of the decoder probabilities of the tokens and eos, between 0 and 1.
        token_confidences: decoder probability of each token, as in WeNet; the mean of both directions if reverse_weight
            is not 0.
        token_probabilities: probability of each token, averaged over the decoders and the CTC head.
    """

    hypothesis: Hypothesis
    score: float
    attention_score: float
    confidence: float
    token_confidences: list[float]
    token_probabilities: list[float]


def attention_rescoring(
    hypotheses: Sequence[Hypothesis], scores: TokenScores, weights: RescoringWeights
) -> list[Rescored]:
    """Return the hypotheses with the combined scores of both passes, best first; ties keep their first-pass order.

    Args:
        hypotheses: results of the first pass, best first.
        scores: decoder scores of their tokens.
        weights: weights of the first pass, the right-to-left decoder and the language model.
    """
    left, right = scores.left.astype(np.float64), None
    decoders, num_decoders = np.exp(left), 1
    if scores.right is not None and weights.reverse_weight > 0:
        right = scores.right.astype(np.float64)
        decoders, num_decoders = (decoders + np.exp(right)) / 2, 2
    rescored = []
    for row, hypothesis in enumerate(hypotheses):
        num = len(hypothesis.tokens)
        language = weights.rescoring_weight * hypothesis.language_score
        acoustic = hypothesis.score - hypothesis.context_score - hypothesis.language_score
        attention = float(left[row, : num + 1].sum())
        if right is not None:
            backward = float(right[row, : num + 1].sum())
            attention = (1 - weights.reverse_weight) * attention + weights.reverse_weight * backward
        probabilities: list[float] = decoders[row, :num].tolist()
        mean = probabilities
        if hypothesis.probabilities:
            pairs = zip(probabilities, hypothesis.probabilities, strict=True)
            mean = [(num_decoders * own + ctc) / (num_decoders + 1) for own, ctc in pairs]
        score = attention + weights.ctc_weight * acoustic + hypothesis.context_score + language
        rescored.append(
            Rescored(
                hypothesis=hypothesis,
                score=score,
                attention_score=attention,
                confidence=math.exp(attention / (num + 1)),
                token_confidences=probabilities,
                token_probabilities=mean,
            )
        )
    return sorted(rescored, key=lambda item: -item.score)


def attention_beam_search(
    next_log_probs: Callable[[list[list[int]]], npt.NDArray[np.float32]],
    max_len: int,
    *,
    beam_size: int,
    eos: int,
    length_penalty: float = 0.0,
    count_sos: bool = False,
) -> list[Hypothesis]:
    """Return hypotheses of a beam search with only the left-to-right decoder, best first. They have no times.

    Args:
        next_log_probs: returns the log-probabilities [n, vocab] of the next token for n token sequences.
        max_len: number of tokens after which the search stops; in WeNet, the number of encoder frames.
        beam_size: number of sequences kept from step to step.
        eos: id of the token that ends a sequence.
        length_penalty: scores are divided by length ** length_penalty. The length does not include eos. With a
            penalty, sequences of length 0 come last and keep their score.
        count_sos: whether the length includes sos; in WeNet it does if sos and eos are different tokens.
    """
    beams: list[tuple[float, list[int], bool]] = [(0.0, [], False)]
    for _ in range(max_len):
        growing = [tokens for _, tokens, ended in beams if not ended]
        if not growing:
            break
        rows = iter(next_log_probs(growing))
        grown: list[tuple[float, list[int], bool]] = []
        for score, tokens, ended in beams:
            if ended:
                grown.append((score, tokens, True))
                continue
            row = next(rows)
            for token in np.argsort(-row, kind="stable")[:beam_size].tolist():
                ends = token == eos
                grown.append((score + float(row[token]), tokens if ends else [*tokens, token], ends))
        grown.sort(key=lambda beam: -beam[0])
        beams = grown[:beam_size]

    def normalised(score: float, length: int) -> float:
        length += count_sos
        return score / length**length_penalty if length or length_penalty == 0 else -math.inf

    found = sorted(((normalised(score, len(t)), score, t) for score, t, _ in beams), key=lambda beam: -beam[0])
    return [Hypothesis(tokens=t, score=own if math.isfinite(own) else score, times=[]) for own, score, t in found]


def word_confidence(probabilities: Sequence[float], calibration: Calibration | None) -> float:
    """Return the confidence of a word: the lowest probability of its tokens, calibrated by Platt scaling.

    A word is correct only if all its tokens are. On real recordings, the minimum distinguished correct words from
    incorrect ones better than the usual geometric mean did. The calibration scales and shifts the log-odds, to match
    the share of correct words.
    """
    confidence = min(probabilities)
    if calibration is None:
        return confidence
    clipped = min(max(confidence, _SMALLEST), 1 - _SMALLEST)
    odds = calibration.scale * math.log(clipped / (1 - clipped)) + calibration.bias
    return 1 / (1 + math.exp(-min(max(odds, -700.0), 700.0)))
