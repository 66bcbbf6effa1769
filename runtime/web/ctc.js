/** The first pass: incremental CTC prefix beam search, with or without hotwords. */

import { BeamSearch } from './beam-search.js';

/**
 * With hotwords two searches run side by side. One ignores them; the other ranks prefixes by score plus bonus. Hotwords that
 * no hypothesis contains therefore change nothing.
 */
export class PrefixBeamSearch {
  #searches;

  constructor(beamSize, blank, context = null) {
    this.beamSize = beamSize;
    this.context = context;
    this.#searches = [new BeamSearch(beamSize, blank, context)];
    if (context) this.#searches.push(new BeamSearch(beamSize, blank, context, true));
  }

  /** Continue with log-probabilities [frames, vocab]. */
  advance(logProbs, vocabSize) {
    const num = Math.min(this.beamSize, vocabSize);
    for (let start = 0; start < logProbs.length; start += vocabSize) {
      const tokens = mostProbable(logProbs, start, vocabSize, num);
      const scores = tokens.map((token) => logProbs[start + token]);
      for (const search of this.#searches) search.advance(tokens, scores);
    }
  }

  /** End the input: phrases that are complete at the end earn their bonus, incomplete ones do not. */
  finish() {
    for (const search of this.#searches) search.finish();
  }

  /** Hypotheses so far, best first: {tokens, score, times, contextScore, probabilities}. */
  hypotheses(limit = Infinity) {
    let beams = [...this.#searches[0].beams];
    if (this.context) {
      const known = new Set(beams.map((beam) => beam.prefix.tokens().join(' ')));
      const named = this.#searches[1].beams.filter((beam) => beam.prefix.bonus > 0);
      beams.push(...named.filter((beam) => !known.has(beam.prefix.tokens().join(' '))));
      const score = (beam) => beam.total + beam.prefix.bonus;
      beams.sort((one, other) => score(other) - score(one));
    }
    return beams.slice(0, limit).map((beam) => ({
      tokens: beam.prefix.tokens(),
      score: beam.total + beam.prefix.bonus,
      contextScore: beam.prefix.bonus,
      ...beam.peaks(),
    }));
  }
}

/** The `num` most probable tokens of the frame at `start`, most probable first, ties by id. */
function mostProbable(logProbs, start, vocabSize, num) {
  const best = [];
  for (let token = 0; token < vocabSize; token += 1) {
    const score = logProbs[start + token];
    if (best.length === num && !(score > logProbs[start + best[num - 1]])) continue;
    let place = best.length === num ? num - 1 : best.length;
    while (place > 0 && logProbs[start + best[place - 1]] < score) {
      best[place] = best[place - 1];
      place -= 1;
    }
    best[place] = token;
  }
  return best;
}
