/** Forced alignment of tokens with the CTC output, and the cut between two words of an utterance that continues. */

/** The most probable alignment of `tokens`: {start, end} in frames for each, or null if there is none. */
export function align(logProbs, vocabSize, tokens, blank) {
  if (!tokens.length) return [];
  const states = [blank, ...tokens.flatMap((token) => [token, blank])];
  const numFrames = logProbs.length / vocabSize, num = states.length;
  const steps = new Uint8Array(numFrames * num);
  // Paths begin in the first blank, before the first frame. Blank may be left out between two different tokens.
  let scores = new Float64Array(num).fill(-Infinity);
  scores[0] = 0;
  for (let frame = 0; frame < numFrames; frame += 1) {
    const arrived = new Float64Array(num);
    for (let state = 0; state < num; state += 1) {
      const maySkip = state >= 3 && state % 2 === 1 && states[state] !== states[state - 2];
      let step = 0, best = scores[state];
      if (state >= 1 && scores[state - 1] > best) [step, best] = [1, scores[state - 1]];
      if (maySkip && scores[state - 2] > best) [step, best] = [2, scores[state - 2]];
      steps[frame * num + state] = step;
      arrived[state] = best + logProbs[frame * vocabSize + states[state]];
    }
    scores = arrived;
  }
  let last = numFrames && scores[num - 2] >= scores[num - 1] ? num - 2 : num - 1;
  if (!(scores[last] > -Infinity)) return null;
  const spans = tokens.map(() => ({ start: -1, end: -1 }));
  for (let frame = numFrames - 1; frame >= 0; frame -= 1) {
    if (last % 2 === 1) {
      const span = spans[(last - 1) / 2];
      if (span.end < 0) span.end = frame + 1;
      span.start = frame;
    }
    last -= steps[frame * num + last];
  }
  return spans;
}

/** Frames before the cut: in the longest pause between two words in the second half; null without two words. */
export function findCut(vocabulary, tokens, logProbs, vocabSize, blank) {
  const words = vocabulary.words(tokens), aligned = align(logProbs, vocabSize, tokens, blank);
  if (!aligned) return null;
  const pauses = words.slice(1).map((word, index) => [aligned[words[index].end - 1].end, aligned[word.begin].start]);
  let late = pauses.filter(([end, start]) => end + start >= logProbs.length / vocabSize);
  if (!late.length) late = pauses.slice(-1);
  if (!late.length) return null;
  late.sort((one, other) => other[1] - other[0] - (one[1] - one[0]) || other[0] - one[0]);
  return Math.floor((late[0][0] + late[0][1] + 1) / 2);
}
