"""Differences between two models' results on recordings: divergence and changed tokens, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from u2moe.quantize.arithmetic import Array
from u2moe.runtime.decoding.ctc import Hypothesis, ctc_greedy_search, ctc_prefix_beam_search
from u2moe.runtime.decoding.rescoring import attention_rescoring
from u2moe.runtime.model.model import Model
from u2moe.runtime.text.word_errors import edit_distance

DOUBT = 0.05  # probability that the value lies outside an interval: half of this probability on each side
PASSES = ("greedy", "second_pass")
MOST_SCORES = 1 << 23  # maximum log-probabilities of one run of the decoders, which limits its hypotheses


@dataclass(frozen=True)
class Estimate:
    """A mean over recordings, with its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2%} ({self.low:.2%} to {self.high:.2%})"


def changed_tokens_as_text(passes: Mapping[str, Mapping[str, float]]) -> str:
    """Describe the share of changed tokens in each pass, given as the fields of an `Estimate`."""
    return ", ".join(f"{name.replace('_', ' ')} {Estimate(**found)}" for name, found in passes.items())


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference between two models on recordings.

    The divergence is that of Kullback and Leibler of the second model from the first, in nats: that of the CTC
    log-probabilities, summed over frames, plus that of the second pass. For the second pass, each model's combined
    scores of the first model's hypotheses are treated as a distribution.
    """

    edits: Array  # between the models' texts [recordings, passes], for each of `PASSES` that they have
    tokens: Array  # number of tokens in the first model's texts [recordings, passes]
    divergences: Array  # [recordings]
    frames: Array  # number of encoder frames [recordings]
    seconds: float  # total duration of the recordings

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the pass with the fewest tokens."""
        return int(self.tokens.sum(axis=0).min())

    def passes(self, doubt: float = DOUBT, times: float = 1.0) -> dict[str, Estimate]:
        """Return the share of changed tokens per pass, with the interval expected for `times` times as much audio."""
        columns = zip(PASSES, self.edits.T, self.tokens.T, strict=False)
        return {name: share_of(edits, tokens, doubt, times) for name, edits, tokens in columns}

    def changed_tokens(self, doubt: float = DOUBT, times: float = 1.0) -> Estimate:
        """Return the share of changed tokens, in the pass whose interval has the higher upper end."""
        return max(self.passes(doubt, times).values(), key=lambda found: found.high)

    def divergence(self, doubt: float = DOUBT, times: float = 1.0) -> Estimate:
        """Return nats of divergence per encoder frame, with an interval: a normal approximation for a ratio of sums."""
        value = float(self.divergences.sum() / max(self.frames.sum(), 1))
        margin = NormalDist().inv_cdf(1 - doubt / 2) * math.sqrt(_variance(self.divergences, self.frames) / times)
        return Estimate(value, max(value - margin, 0.0), value + margin)

    def scaled(self, share: float) -> Difference:
        """Return the difference expected if the divergence is multiplied by `share`. Edits scale with sqrt(`share`)."""
        return replace(self, edits=self.edits * math.sqrt(share), divergences=self.divergences * share)

    def summary(self) -> dict[str, Any]:
        """Return the written bundle's entries for the damage section of the report."""
        changed = self.changed_tokens()
        return {"changed_tokens": changed.value, "changed_tokens_at_most": changed.high, "written": self.data()}

    def data(self) -> dict[str, Any]:
        """Return the difference as plain data; estimates include their intervals."""
        return {
            "recordings": len(self.frames), "seconds": round(self.seconds, 2), "frames": int(self.frames.sum()),
            "tokens": self.num_tokens, "changed_texts": int((self.edits > 0).any(axis=1).sum()),
            "divergence": vars(self.divergence()),
            "changed_tokens": {name: vars(found) for name, found in self.passes().items()},
        }  # fmt: skip


def share_of(edits: Array, tokens: Array, doubt: float = DOUBT, times: float = 1.0) -> Estimate:
    """Return edits per token over recordings [n], with an interval.

    The number of edits is treated as a Poisson variable with Byar's confidence limits (Breslow and Day 1987). They are
    nearly exact even for zero edits. Edits within a recording are correlated. Edits and tokens are therefore divided by
    the design effect (Korn and Graubard 1998) if it exceeds 1. The design effect is the ratio of the variance between
    recordings to the variance that independent edits would have.
    """
    total, size = float(edits.sum()), max(float(tokens.sum()), 1.0)
    effect = max(_variance(edits, tokens) * size**2 / total, 1.0) if total else 1.0
    count, size = times * total / effect, times * size / effect
    score = NormalDist().inv_cdf(1 - doubt / 2)
    low, high = (
        k * (1 - 1 / (9 * k) + sign * score / (3 * math.sqrt(k))) ** 3 if k else 0.0
        for k, sign in ((count, -1), (count + 1, 1))
    )
    return Estimate(count / size, max(low, 0.0) / size, high / size)


def _variance(values: Array, sizes: Array) -> float:
    """Return the variance of sum(values) / sum(sizes) over independent recordings [n]; 0 for a single recording."""
    if len(values) < 2:
        return 0.0
    ratio = values.sum() / max(sizes.sum(), 1)
    squares = np.square(values - ratio * sizes).sum()
    return float(squares * len(values) / (len(values) - 1) / max(sizes.sum(), 1) ** 2)


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A model's results for a recording."""

    output: Array  # of the encoder [time, dim]
    log_probs: Array  # [time, vocab]
    hypotheses: Sequence[Hypothesis]  # of the prefix beam search, best first; none without a decoder
    scores: Array  # combined score of both passes for each hypothesis
    texts: Sequence[Sequence[int]]  # tokens of the best result, for each of `PASSES` that the model has


def hear(model: Model, frames: Array) -> Heard:
    """Recognise features [frames, mel] with full context, using the bundle's beam size and score weights."""
    output = model.encode(frames)
    log_probs = model.ctc(output)
    texts, hypotheses, scores = [ctc_greedy_search(log_probs).tokens], list[Hypothesis](), np.zeros(0)
    if model.has_decoder:
        hypotheses = ctc_prefix_beam_search(log_probs, model.manifest.decoding.beam_size)
        scores = combined_scores(model, output, hypotheses)
        texts.append(hypotheses[int(np.argmax(scores))].tokens)
    return Heard(output=output, log_probs=log_probs, hypotheses=hypotheses, scores=scores, texts=texts)


def combined_scores(model: Model, output: Array, hypotheses: Sequence[Hypothesis]) -> Array:
    """Return the combined scores of both passes, in the order of `hypotheses`."""
    longest = 1 + max((len(hypothesis.tokens) for hypothesis in hypotheses), default=0)
    at_once = max(MOST_SCORES // (longest * model.manifest.model.vocab_size), 1)
    scores: dict[int, float] = {}
    for begin in range(0, len(hypotheses), at_once):
        some = hypotheses[begin : begin + at_once]
        token_scores = model.token_scores(output, [hypothesis.tokens for hypothesis in some])
        found = attention_rescoring(some, token_scores, model.manifest.decoding.weights())
        scores |= {id(item.hypothesis): item.score for item in found}
    return np.array([scores[id(hypothesis)] for hypothesis in hypotheses])


def first_divergence(expected: Heard, log_probs: Array) -> float:
    """Return the divergence of CTC log-probabilities from the expected ones, in nats, summed over frames."""
    logs = expected.log_probs.astype(np.float64)
    products = np.exp(logs)
    products *= np.subtract(logs, log_probs, out=logs)
    return float(products.sum())


def second_divergence(model: Model, output: Array, expected: Heard) -> float:
    """Return the divergence, in nats, of a model's scores of the expected hypotheses; softmax normalises both."""
    if not expected.hypotheses:  # there is no decoder
        return 0.0
    both = expected.scores, combined_scores(model, output, expected.hypotheses)
    logs, others = (each - each.max() - np.log(np.exp(each - each.max()).sum()) for each in both)
    return float((np.exp(logs) * (logs - others)).sum())


def compare(
    reference: Model, made: Model, features: Sequence[Array], progress: Callable[[int], None] = lambda _: None
) -> Difference:
    """Compare the results of `made` with those of `reference` for features [frames, mel] of at least one recording.

    To compare texts, each model rescores its own hypotheses. For the divergence, both rescore those of `reference`.
    `progress` is called with the number of finished recordings.
    """
    rows = []
    for number, frames in enumerate(features, 1):
        expected, found = hear(reference, frames), hear(made, frames)
        nats = first_divergence(expected, found.log_probs) + second_divergence(made, found.output, expected)
        changes = [edit_distance(*texts) for texts in zip(expected.texts, found.texts, strict=True)]
        rows.append((changes, [len(text) for text in expected.texts], nats, len(expected.log_probs)))
        progress(number)
    edits, tokens, divergences, lengths = (np.array(column) for column in zip(*rows, strict=True))
    seconds = sum(map(len, features)) * reference.manifest.features.frame_shift_ms / 1000
    return Difference(edits=edits, tokens=tokens, divergences=divergences, frames=lengths, seconds=seconds)
