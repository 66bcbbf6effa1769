/** Endpoint detection: Kaldi's rules on the blanks of the CTC head. */

const SILENCE_LOG_PROB = Math.log(0.8);

/** An utterance with less silence at its end may end within a word. */
export const SHORTEST_PAUSE_S = 0.4;

/** An utterance ends when any rule fires: long silence, shorter silence after speech, or it has become too long. */
export const DEFAULT_RULES = Object.freeze({
  rule1: { mustContainNonsilence: false, minTrailingSilence: 2.4, minUtteranceLength: 0 },
  rule2: { mustContainNonsilence: true, minTrailingSilence: 1.2, minUtteranceLength: 0 },
  rule3: { mustContainNonsilence: false, minTrailingSilence: 0, minUtteranceLength: 20 },
});

/** The rules with which a program replaces some of the defaults; null disables one, `false` for all of them: no endpoints. */
export function endpointRules(endpoint) {
  if (endpoint === false || endpoint === null) return null;
  const given = endpoint === true || endpoint === undefined ? {} : endpoint, rules = [];
  if (typeof given !== 'object') throw new RangeError(`endpoint must be true, false or rules, got ${endpoint}`);
  const unknown = Object.keys(given).find((name) => !(name in DEFAULT_RULES));
  if (unknown) throw new RangeError(`endpoint has no ${unknown}: there are ${Object.keys(DEFAULT_RULES).join(', ')}`);
  for (const [number, name] of Object.keys(DEFAULT_RULES).entries()) {
    const rule = given[name] === undefined ? DEFAULT_RULES[name] : given[name];
    if (rule === null) continue;
    const { mustContainNonsilence = false, minTrailingSilence = 0, minUtteranceLength = 0 } = rule;
    if (!(minTrailingSilence >= 0 && minUtteranceLength >= 0 && minTrailingSilence + minUtteranceLength > 0)) {
      throw new RangeError(`endpoint ${name} needs minTrailingSilence or minUtteranceLength above 0`);
    }
    rules.push({ number: number + 1, mustContainNonsilence, minTrailingSilence, minUtteranceLength });
  }
  return rules;
}

/** Finds the first frame at which a rule fires, for any split of the frames. */
export class Endpointer {
  #rules;
  #blank;

  constructor(rules, frameS, blank) {
    const frames = (seconds) => Math.ceil(Number((seconds / frameS).toFixed(6)));
    this.#rules = rules.map((rule) => ({
      number: rule.number,
      needsSpeech: rule.mustContainNonsilence,
      silence: frames(rule.minTrailingSilence),
      length: frames(rule.minUtteranceLength),
    }));
    this.#blank = blank;
    this.reset();
  }

  reset() {
    this.numFrames = this.numSilent = 0;
    this.hasSpeech = false;
  }

  /** Continue through log-probabilities; {numFrames, rule, trailingSilence} when a rule fires, else null. */
  advance(logProbs, vocabSize) {
    for (let index = 0; index * vocabSize < logProbs.length; index += 1) {
      const silent = logProbs[index * vocabSize + this.#blank] > SILENCE_LOG_PROB;
      this.numFrames += 1;
      this.numSilent = silent ? this.numSilent + 1 : 0;
      this.hasSpeech ||= !silent;
      for (const { number, needsSpeech, silence, length } of this.#rules) {
        if (this.numSilent >= silence && this.numFrames >= length && (this.hasSpeech || !needsSpeech)) {
          return { numFrames: index + 1, rule: number, trailingSilence: this.numSilent };
        }
      }
    }
    return null;
  }
}
