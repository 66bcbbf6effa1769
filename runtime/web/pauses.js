/** Pauses in an utterance, and word boundaries derived from them: CTC gives the peaks of words, not their edges. */

const MIN_PAUSE_S = 0.08;
const POWER = 0.25;
const QUIETEST = 12;
const QUIET = 0.2;

/** A token extends at most half of this from its peak. */
export const LONGEST_TOKEN_S = 1;

/** Loudness of each frame of features, on the scale of log energy; of MFCC, the mean of the log energies. */
export function loudness(features, { num_mel_bins: numBins, num_ceps: numCeps = 0 }) {
  if (numCeps) return features.filter((_, index) => index % numCeps === 0).map((c0) => c0 / Math.sqrt(numBins));
  const levels = new Float32Array(features.length / numBins);
  for (let frame = 0; frame < levels.length; frame += 1) {
    let sum = 0;
    for (let bin = 0; bin < numBins; bin += 1) sum += Math.exp(POWER * features[frame * numBins + bin]);
    levels[frame] = Math.log(sum / numBins) / POWER;
  }
  return levels;
}

/** Quiet stretches as [start, end] in seconds from the first frame. */
export function findPauses(levels, frameS) {
  if (!levels.length) return [];
  const sorted = Float32Array.from(levels).sort();
  const loud = percentile(sorted, 0.99), floor = Math.max(percentile(sorted, 0.1), loud - QUIETEST);
  const threshold = Math.fround(floor + QUIET * (loud - floor));
  const pauses = [];
  let start = -1;
  for (let frame = 0; frame <= levels.length; frame += 1) {
    const quiet = frame < levels.length && levels[frame] < threshold;
    if (quiet && start < 0) start = frame;
    if (!quiet && start >= 0) {
      pauses.push([start * frameS, frame * frameS]);
      start = -1;
    }
  }
  return pauses.filter(([begin, end]) => end - begin >= MIN_PAUSE_S - 1e-9);
}

function percentile(sorted, share) {
  const place = share * (sorted.length - 1), below = Math.floor(place);
  const above = Math.min(below + 1, sorted.length - 1);
  return sorted[below] + (sorted[above] - sorted[below]) * (place - below);
}

/** Start and end of each token in seconds, from the frames at which they peak. */
export function tokenSpans(times, frameS, duration) {
  return times.map((time, index) => {
    const peak = time * frameS;
    const earliest = index > 0 ? ((times[index - 1] + time) / 2) * frameS : 0;
    const latest = index + 1 < times.length ? ((time + times[index + 1]) / 2) * frameS : duration;
    return [Math.max(peak - LONGEST_TOKEN_S / 2, earliest), Math.min(peak + LONGEST_TOKEN_S / 2, latest)];
  });
}

/**
 * Move word boundaries to the pauses: words end where the longest pause between two peaks begins, and the next word begins
 * where it ends.
 */
export function endAtPauses(words, peaks, pauses) {
  const starts = words.map(([start]) => start), ends = words.map(([, end]) => end);
  for (let place = 0; place <= words.length; place += 1) {
    const before = place ? peaks[place - 1][1] : -Infinity;
    const after = place < words.length ? peaks[place][0] : Infinity;
    const earliest = place ? starts[place - 1] : -Infinity;
    const latest = place < words.length ? ends[place] : Infinity;
    const between = pauses.filter(([start, end]) => end >= before && start <= after && start > earliest && end < latest);
    if (!between.length) continue;
    const [start, end] = between.reduce((best, each) => (each[1] - each[0] > best[1] - best[0] ? each : best));
    if (place && start - Math.max(before, earliest) <= LONGEST_TOKEN_S) ends[place - 1] = start;
    if (place < words.length && after - end <= LONGEST_TOKEN_S) starts[place] = end;
    else if (place > 0 && place < words.length) starts[place] = Math.max(starts[place], ends[place - 1]);
  }
  return starts.map((start, index) => [start, ends[index]]);
}
