/** Final results of utterances: rescoring by the attention decoders, text, words, times and confidences. */

import { endAtPauses, tokenSpans } from './pauses.js';

const rounded = (seconds) => Number(seconds.toFixed(3));

/**
 * Combine the scores of both passes, best first:
 *
 *     score = (1 - reverseWeight) * leftToRight + reverseWeight * rightToLeft + ctcWeight * ctc + bonus of hotwords
 *
 * @param scores {left, right, width}: log-probabilities of each token and of eos [hypotheses, width]; right may be null.
 */
export function attentionRescoring(hypotheses, scores, ctcWeight, reverseWeight) {
  const usesRight = scores.right !== null && reverseWeight > 0;
  const rescored = hypotheses.map((hypothesis, row) => {
    const num = hypothesis.tokens.length, begin = row * scores.width;
    const left = scores.left.slice(begin, begin + num + 1);
    let attention = sum(left), probabilities = Array.from(left.slice(0, num), Math.exp);
    if (usesRight) {
      const right = scores.right.slice(begin, begin + num + 1);
      attention = (1 - reverseWeight) * attention + reverseWeight * sum(right);
      probabilities = probabilities.map((value, index) => (value + Math.exp(right[index])) / 2);
    }
    const decoders = usesRight ? 2 : 1;
    const mean = probabilities.map((value, index) => (decoders * value + hypothesis.probabilities[index]) / (decoders + 1));
    const score = attention + ctcWeight * (hypothesis.score - hypothesis.contextScore) + hypothesis.contextScore;
    return { hypothesis, score, attentionScore: attention, probabilities: mean };
  });
  return rescored.sort((one, other) => other.score - one.score);
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

/** The expected share of correct words for a confidence, if the bundle has a calibration. */
function calibrated(confidence, calibration) {
  if (!calibration) return confidence;
  const clipped = Math.min(Math.max(confidence, 1e-6), 1 - 1e-6);
  const odds = calibration.scale * Math.log(clipped / (1 - clipped)) + calibration.bias;
  return 1 / (1 + Math.exp(-Math.min(Math.max(odds, -700), 700)));
}

/**
 * The final result of an utterance.
 *
 * @param ranked [{hypothesis, score, attentionScore, probabilities}], best first.
 * @param utterance {number, start, numFrames}: its segment number and its encoder frames.
 * @param pauses [start, end] in seconds from the start of the audio.
 */
export function finalResult({ ranked, utterance, pauses, vocabulary, frameS, calibration, limit }) {
  const nbest = new Map();
  for (const { hypothesis, score, attentionScore } of ranked) {
    const text = vocabulary.text(hypothesis.tokens);
    if (nbest.has(text)) continue; // the same text from other tokens, less probable
    nbest.set(text, { text, tokens: hypothesis.tokens, score, ctcScore: hypothesis.score, attentionScore });
  }
  const { hypothesis: best, probabilities } = ranked[0], alternatives = [...nbest.values()].slice(0, limit);
  const words = wordsOf({ best, probabilities, utterance, pauses, vocabulary, frameS, calibration });
  return {
    text: alternatives[0].text,
    isFinal: true,
    segment: utterance.number,
    start: words[0]?.start ?? 0,
    end: words.at(-1)?.end ?? 0,
    tokens: best.tokens,
    times: best.times.map((time) => rounded((utterance.start + time) * frameS)),
    words,
    confidence: words.length ? sum(words.map((word) => word.confidence)) / words.length : null,
    score: alternatives[0].score,
    nbest: alternatives,
  };
}

function wordsOf({ best, probabilities, utterance, pauses, vocabulary, frameS, calibration }) {
  const words = vocabulary.words(best.tokens), begin = utterance.start * frameS;
  const spans = tokenSpans(best.times, frameS, utterance.numFrames * frameS);
  const meeting = words.map((word) => [begin + spans[word.begin][0], begin + spans[word.end - 1][1]]);
  const peaks = words.map((word) => [begin + best.times[word.begin] * frameS, begin + best.times[word.end - 1] * frameS]);
  return endAtPauses(meeting, peaks, pauses).map(([start, end], index) => {
    const { text, begin: first, end: last } = words[index];
    const confidence = calibrated(Math.min(...probabilities.slice(first, last)), calibration);
    return { word: text, start: rounded(start), end: rounded(end), confidence };
  });
}
